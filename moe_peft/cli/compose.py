"""`moe-peft compose`: one routed adapter whose experts are trained LoRAs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..files import check_free
from ..messages import shown
from ..tools.choose_loras import choose_loras
from ..tools.compose import compose
from ..tools.prototypes import fit_centroids, fit_directions
from .distil import batches
from .from_loras import load_base, parser_of, router_config, write


def run(argv: list[str]) -> int:
    """Write a routed adapter made of LoRAs.

    Args:
        argv: The words after the verb: LoRAs as NAME=FOLDER or FOLDER, and flags.

    Raises:
        ValueError: A LoRA is none, or does not fit the base model; nothing has been written.
    """
    given = _parser().parse_args(argv)
    check_free(given.output)
    loras = _named(given.loras)
    if (given.choose is None) != (given.texts is None) or (given.choose is None and given.diversity is not None):
        raise ValueError("--choose K and --texts FILE go together, and --diversity with them. Give both, or none.")
    files = _files(given.centroids, loras)
    base = load_base(given, next(iter(loras.values())))
    if given.choose is not None:
        loras = _chosen(given, base, loras)
    fitted = router_config(given, len(loras), directions=given.directions, centroids=bool(files))
    model = compose(base, loras, fitted)
    if given.directions:
        fit_directions(model)
    if files:
        fit_centroids(model, {number: _texts(base, files[name]) for number, name in enumerate(loras)})
    write(model, given.output)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(
        "compose",
        "Make one routed adapter of LoRAs. The router is new: train it, or give --directions or --centroids.",
    )
    parser.add_argument("loras", nargs="+", metavar="[NAME=]LORA", help="folders of LoRAs, or their names on the Hub")
    without = parser.add_mutually_exclusive_group()
    without.add_argument(
        "--directions", action="store_true", help="without training: the direction that each LoRA answers most (Arrow)"
    )
    without.add_argument(
        "--centroids",
        action="append",
        metavar="NAME=FILE",
        help="without training: the mean input on texts of a LoRA's task, one text per line; once for each LoRA",
    )
    parser.add_argument(
        "--choose", type=int, metavar="K", help="compose the K of them that are best on --texts and least alike"
    )
    parser.add_argument("--texts", metavar="FILE", help="with --choose: a few texts of the task, one per line")
    parser.add_argument(
        "--diversity", type=float, help="with --choose: what likeness costs, over what the best gains; default: 0.5"
    )
    return parser


def _texts(base: Any, file: str) -> list[dict[str, Any]]:
    """The lines of a file as batches for a base model."""
    from transformers import AutoTokenizer

    return batches(Path(file), AutoTokenizer.from_pretrained(base.name_or_path))


def _files(words: list[str] | None, loras: dict[str, str]) -> dict[str, str]:
    """Name of an expert -> the file with its texts; nothing where no file is given."""
    files = dict(word.partition("=")[::2] for word in words or ())
    if words and (len(files) < len(words) or files.keys() != loras.keys() or not all(files.values())):
        raise ValueError(
            f"--centroids {shown(words)} must name one file for each LoRA, as in "
            f"{' '.join(f'--centroids {name}=FILE' for name in loras)[:200]}."
        )
    return files


def _chosen(given: argparse.Namespace, base: Any, loras: dict[str, str]) -> dict[str, str]:
    """The LoRAs that the texts speak for."""
    texts = _texts(base, given.texts)
    settings = {} if given.diversity is None else {"diversity": given.diversity}
    found = choose_loras(base, loras, texts, given.choose, **settings)
    print(f"chosen: {found}")
    return found.adapters


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
