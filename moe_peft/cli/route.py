"""`moe-peft route`: which experts each token of a text uses."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from ..config.card_section import AUTO_CLASSES
from ..files import write_text
from ..tables import table
from ..tools.health import read_config
from ..tools.tokens import TokenRouting, token_routing
from .errors import not_found
from .inspect import local_folder

COLUMNS = 6


def run(argv: list[str]) -> int:
    """Print a table of tokens and experts.

    Args:
        argv: The words after the verb.

    Raises:
        ValueError: The adapter, its base model or a place is not found, or nothing was routed.
    """
    parser = argparse.ArgumentParser(
        prog="moe-peft route",
        description="Run the adapted model on a text and show the experts that each token uses, with their weights.",
        allow_abbrev=False,
    )
    parser.add_argument("text", help="the text, in quotes")
    parser.add_argument("--adapter", required=True, help="folder of an adapter, or its name on the Hub")
    parser.add_argument("--base", help="base model, a name on the Hub or a folder; default: the adapter's own")
    parser.add_argument("--top", type=int, default=2, metavar="K", help="experts shown of each token; default: 2")
    parser.add_argument(
        "--place",
        metavar="PART",
        help="places whose name holds this, such as layers.3.mlp; default: one of each layer",
    )
    parser.add_argument("--json", metavar="FILE", help="write the weights of all places and experts there")
    given = parser.parse_args(argv)
    if given.top < 1:
        raise ValueError(f"--top {given.top} must be at least 1.")
    if given.json and not Path(given.json).resolve().parent.is_dir():
        raise ValueError(f"--json {given.json}: there is no folder {Path(given.json).parent}.")
    folder = local_folder(given.adapter)
    model, tokenizer = load(folder, given.base)
    routing = token_routing(model, tokenizer, given.text)
    if given.json:
        content = {"tokens": routing.tokens, "weights": {place: w.tolist() for place, w in routing.weights.items()}}
        write_text(Path(given.json), json.dumps(content))
    print(report(routing, chosen(list(routing.weights), given.place), given.top))
    return 0


def load(folder: Path, base: str | None, adapter_name: str = "default") -> tuple[Any, Any]:
    """The adapted model and its tokenizer.

    Args:
        folder: Of the adapter; its own tokenizer counts before the base model's.
        base: Name of the base model; None takes the adapter's own.
        adapter_name: What the adapter is called in the model.

    Raises:
        ValueError: No base model is known, or it cannot be found.
    """
    import transformers
    from peft import PeftModel

    config = read_config(folder)
    name = base or config.base_model_name_or_path
    if not name:
        raise ValueError(f"{folder} names no base model. Give it with --base.")
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    auto_class = getattr(transformers, AUTO_CLASSES.get(str(config.task_type or "CAUSAL_LM"), "AutoModel"))
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder) if has_tokenizer else name)
        model: Any = auto_class.from_pretrained(name)
    except OSError as error:
        raise ValueError(not_found("the base model" if base is None else "--base", name, error)) from error
    if has_tokenizer and len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    return PeftModel.from_pretrained(model, str(folder), adapter_name=adapter_name), tokenizer


def chosen(places: list[str], part: str | None) -> list[str]:
    """Places to show.

    Args:
        places: All.
        part: What a name must hold; None takes the first place of each layer.

    Raises:
        ValueError: No name holds it.
    """
    if part is not None:
        found = [place for place in places if part in place]
        if not found:
            raise ValueError(f"--place {part}: no place is called so. Places: {', '.join(places[:COLUMNS])}, ...")
        return found
    firsts: dict[str, str] = {}
    for place in places:
        layer = re.search(r"\.(\d+)(?:\.|$)", place)
        firsts.setdefault(layer.group(1) if layer else place, place)
    return list(firsts.values())


def report(routing: TokenRouting, places: list[str], top: int) -> str:
    """Tables of tokens and experts, of some places side by side.

    Args:
        routing: What was decided.
        places: Which to show.
        top: Experts of each token.
    """
    parts = []
    for start in range(0, len(places), COLUMNS):
        group = places[start : start + COLUMNS]
        rows = [["token", *(f"[{start + index}]" for index in range(len(group)))]]
        tops = [routing.top(place, top) for place in group]
        for number, token in enumerate(routing.tokens):
            cells = [" ".join(f"{expert}:{weight:.2f}" for expert, weight in own[number]) for own in tops]
            rows.append([token, *cells])
        names = [f"[{start + index}] {place}" for index, place in enumerate(group)]
        parts.append("\n".join([*names, "", table(rows)]))
    return "\n\n".join([*parts, "expert:weight, the largest first"])
