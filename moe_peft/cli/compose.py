"""`moe-peft compose`: one routed adapter whose experts are trained LoRAs."""

from __future__ import annotations

from pathlib import Path

from ..files import check_free
from ..tools.compose import compose
from ..tools.prototypes import fit_directions
from .from_loras import load_base, parser_of, router_config, write


def run(argv: list[str]) -> int:
    """Write a routed adapter made of LoRAs.

    Args:
        argv: The words after the verb: LoRAs as NAME=FOLDER or FOLDER, and flags.

    Raises:
        ValueError: A LoRA is none, or does not fit the base model; nothing has been written.
    """
    parser = parser_of(
        "compose", "Make one routed adapter of LoRAs. The router is new: train it, or give --directions."
    )
    parser.add_argument("loras", nargs="+", metavar="[NAME=]LORA", help="folders of LoRAs, or their names on the Hub")
    parser.add_argument(
        "--directions", action="store_true", help="without training: the direction that each LoRA answers most (Arrow)"
    )
    given = parser.parse_args(argv)
    check_free(given.output)
    loras = _named(given.loras)
    base = load_base(given, next(iter(loras.values())))
    model = compose(base, loras, router_config(given, len(loras), directions=given.directions))
    if given.directions:
        fit_directions(model)
    write(model, given.output)
    return 0


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
