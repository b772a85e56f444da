"""`moe-peft distil`: one LoRA in the place of a routed adapter, with its error."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..files import check_free
from ..tools.distil import distil_to_lora
from .inspect import local_folder
from .route import load

ROWS = 8


def run(argv: list[str]) -> int:
    """Write the LoRA and print what it loses.

    Args:
        argv: The words after the verb.

    Raises:
        ValueError: The adapter, its base model or the texts are missing, or no LoRA comes near; nothing is written.
    """
    parser = argparse.ArgumentParser(
        prog="moe-peft distil",
        description="Make one stock LoRA that comes near a routed adapter of linear layers. It is an approximation, "
        "whose error on the texts is printed and written into the card.",
        allow_abbrev=False,
    )
    parser.add_argument("adapter", help="folder of an adapter, or its name on the Hub")
    parser.add_argument("--texts", required=True, metavar="FILE", help="a text per line, like those to serve")
    parser.add_argument("--held_out", metavar="FILE", help="texts to measure on; default: those of --texts")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to make")
    parser.add_argument("--base", help="base model, a name on the Hub or a folder; default: the adapter's own")
    parser.add_argument("--rank", type=int, help="of the LoRA; default: the smallest that loses 10%% at most")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of distillation; default: 100")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="default: 1e-3")
    given = parser.parse_args(argv)
    check_free(given.output)
    model, tokenizer = load(local_folder(given.adapter), given.base)
    found = distil_to_lora(
        model,
        given.output,
        batches(Path(given.texts), tokenizer),
        fresh_base=lambda: load(local_folder(given.adapter), given.base)[0].unload(),
        rank=given.rank,
        steps=given.steps,
        learning_rate=given.learning_rate,
        held_out=None if given.held_out is None else batches(Path(given.held_out), tokenizer),
    )
    print(f"{given.output}: {found}")
    return 0


def batches(path: Path, tokenizer: Any, rows: int = ROWS) -> list[dict[str, Any]]:
    """The lines of a file as batches.

    Args:
        path: The file.
        tokenizer: Of the model.
        rows: Lines of a batch.

    Raises:
        ValueError: It has no line.
    """
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} has no line of text.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    parts = [lines[start : start + rows] for start in range(0, len(lines), rows)]
    keys = ("input_ids", "attention_mask")
    made = [tokenizer(part, return_tensors="pt", padding=True, truncation=True, max_length=2048) for part in parts]
    return [{key: own[key] for key in keys if key in own} for own in made]
