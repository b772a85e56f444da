"""What the verbs share that make a routed adapter of trained LoRAs: flags, the router that they name, and writing."""

from __future__ import annotations

import argparse
from typing import Any

from ..files import new_folder
from ..methods import RoutedConfig
from ..routers import SCORERS, SELECTORS
from ..tools.stock_lora import read_lora

EITHER_SIGN = "sign_agnostic"


def parser_of(verb: str, description: str) -> argparse.ArgumentParser:
    """A parser with the flags of base, router and output.

    Args:
        verb: Name of the verb.
        description: What it does.
    """
    parser = argparse.ArgumentParser(prog=f"moe-peft {verb}", description=description, allow_abbrev=False)
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to make")
    parser.add_argument("--base", help="base model, a name on the Hub or a folder; default: the LoRA's own")
    parser.add_argument("--router", choices=SELECTORS, help="rule that selects; default: the two best of each token")
    parser.add_argument("--scorer", choices=SCORERS, help="what scores the experts; default: linear")
    parser.add_argument("--top_k", type=int, help="experts of a token")
    return parser


def load_base(given: argparse.Namespace, lora: str) -> Any:
    """The base model that the flags or the LoRA name.

    Raises:
        ValueError: Neither names one.
    """
    from transformers import AutoModelForCausalLM

    name = given.base or read_lora(lora).config.base_model_name_or_path
    if not name:
        raise ValueError("The LoRA names no base model. Give it with --base.")
    return AutoModelForCausalLM.from_pretrained(name, dtype="auto")


def router_config(
    given: argparse.Namespace, num_experts: int, *, directions: bool = False, centroids: bool = False
) -> RoutedConfig | None:
    """The router that the flags name; None for the default.

    Args:
        given: Values of the flags.
        num_experts: E.
        directions: Whether the experts are scored by the direction that each answers most.
        centroids: Whether they are scored by the mean input of their texts.
    """
    if not (given.router or given.scorer or given.top_k or directions or centroids):
        return None
    fields: dict[str, Any] = {"num_experts": num_experts, "task_type": "CAUSAL_LM"}
    fields |= {name: own for name in ("router", "scorer", "top_k") if (own := getattr(given, name)) is not None}
    if centroids:
        fields |= {"scorer": _of_prototypes()}
    if directions:
        fields |= {"scorer": _of_either_sign(), "router_args": {EITHER_SIGN: True}}
    if fields.get("top_k", 2) > 1 and given.router in (None, "top_k") and num_experts > 1:
        fields["norm_topk_prob"] = True
    return RoutedConfig(**fields)


def _of_either_sign() -> str:
    """The scorer that compares directions whatever their sign, as those of a LoRA have none."""
    return _of_prototypes(EITHER_SIGN)


def _of_prototypes(*options: str) -> str:
    """The scorer that compares a token with a vector of each expert, and has these options."""
    kinds = {name: {option.name for option in own.options} for name, own in SCORERS.items() if own.takes_prototypes}
    return next(name for name, own in kinds.items() if own.issuperset(options))


def write(model: Any, output: str) -> None:
    """Save an adapter beside its place, rename it, and say what it is."""
    with new_folder(output) as growing:
        model.save_pretrained(str(growing))
    print(f"{output}: {model.peft_config['default'].summary()}")
