"""`moe-peft compose` and `moe-peft upcycle`: routed adapters that start from trained LoRAs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..files import check_free, new_folder
from ..methods import RoutedConfig
from ..routers import SCORERS, SELECTORS
from ..tools.compose import compose
from ..tools.prototypes import fit_directions
from ..tools.stock_lora import read_lora
from ..tools.upcycle import upcycle

EITHER_SIGN = "sign_agnostic"


def run(argv: list[str]) -> int:
    """Write a routed adapter made of LoRAs; the verb's name decides from how many.

    Args:
        argv: The words after the verb: LoRAs as NAME=FOLDER or FOLDER, and flags.

    Raises:
        ValueError: A LoRA is none, or does not fit the base model; nothing has been written.
    """
    given = _parser().parse_args(argv)
    check_free(given.output)
    loras = _named(given.loras)
    base_name = given.base or read_lora(next(iter(loras.values()))).config.base_model_name_or_path
    if not base_name:
        raise ValueError("The LoRA names no base model. Give it with --base.")
    if given.num_experts is None:
        model = compose(_load(base_name), loras, _config(given, len(loras)))
        if given.directions:
            fit_directions(model)
    elif len(loras) > 1:
        raise ValueError(f"--num_experts makes several experts of one LoRA, and {len(loras)} were given.")
    else:
        lora = next(iter(loras.values()))
        settings = {"rho": given.rho, "split": given.split, "seed": given.seed}
        model = upcycle(_load(base_name), lora, given.num_experts, _config(given, given.num_experts), **settings)
    with new_folder(given.output) as growing:
        model.save_pretrained(str(growing))
    config: Any = model.peft_config["default"]
    print(f"{given.output}: {config.summary()}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moe-peft compose",
        description="Make one routed adapter of LoRAs (moe-peft compose law=a tax=b), or several experts of one "
        "(moe-peft upcycle a --num_experts 8). The router is new: train it, or give --directions.",
        allow_abbrev=False,
    )
    parser.add_argument("loras", nargs="+", metavar="[NAME=]LORA", help="folders of LoRAs, or their names on the Hub")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to make")
    parser.add_argument("--base", help="base model, a name on the Hub or a folder; default: the LoRA's own")
    parser.add_argument("--router", choices=SELECTORS, help="rule that selects; default: the two best of each token")
    parser.add_argument("--scorer", choices=SCORERS, help="what scores the experts; default: linear")
    parser.add_argument("--top_k", type=int, help="experts of a token")
    parser.add_argument(
        "--directions", action="store_true", help="without training: the direction that each LoRA answers most (Arrow)"
    )
    parser.add_argument("--num_experts", type=int, help="upcycle: experts to make of the one LoRA")
    parser.add_argument("--rho", type=float, default=0.0, help="upcycle: share of the rows drawn again; default: 0")
    parser.add_argument("--split", action="store_true", help="upcycle: give each expert a part of the rank")
    parser.add_argument("--seed", type=int, default=0, help="upcycle: of the rows that are drawn")
    return parser


def _named(words: list[str]) -> dict[str, str]:
    """Name of an expert -> its LoRA; a folder's own name where none is given."""
    loras: dict[str, str] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        name, folder = (name, folder) if equals else (Path(word).name, word)
        if name in loras:
            raise ValueError(f"Two LoRAs are called {name}. Write NAME=FOLDER with different names.")
        loras[name] = folder
    return loras


def _config(given: argparse.Namespace, num_experts: int) -> RoutedConfig | None:
    """The router that the flags name; None for the default."""
    if not (given.router or given.scorer or given.top_k or given.directions):
        return None
    fields: dict[str, Any] = {"num_experts": num_experts, "task_type": "CAUSAL_LM"}
    fields |= {name: own for name in ("router", "scorer", "top_k") if (own := getattr(given, name)) is not None}
    if given.directions:
        fields |= {"scorer": _of_either_sign(), "router_args": {EITHER_SIGN: True}}
    if fields.get("top_k", 2) > 1 and given.router in (None, "top_k") and num_experts > 1:
        fields["norm_topk_prob"] = True
    return RoutedConfig(**fields)


def _of_either_sign() -> str:
    """The scorer that compares directions whatever their sign, as those of a LoRA have none."""
    kinds = {name: {option.name for option in own.options} for name, own in SCORERS.items() if own.takes_prototypes}
    return next(name for name, options in kinds.items() if EITHER_SIGN in options)


def _load(name: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(name, dtype="auto")
