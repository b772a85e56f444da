"""`moe-peft report`: a page on what an adapter's routers decide about texts."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..tools.report import make_batches, read_texts, routing_report
from .inspect import local_folder
from .route import load

ROWS, LENGTH, BATCH = 200, 512, 8


def run(argv: list[str]) -> int:
    """Measure, write the page, and print what to do.

    Args:
        argv: The words after the verb.

    Raises:
        ValueError: The adapter, its base model or the texts are not found or cannot be read, or nothing routes.
    """
    given = _parser().parse_args(argv)
    for name in ("rows", "max_length", "batch_size"):
        if getattr(given, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(given, name)} must be at least 1.")
    folder = local_folder(given.adapter)
    output = Path(given.output) if given.output else folder / "routing_report"
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file. Name a folder.")
    for file in given.data:
        if not Path(file).is_file():
            raise ValueError(f"--data {file}: there is no such file. Name a file of JSON lines.")
    model, tokenizer = load(folder, given.base)
    texts = read_texts(given.data, tokenizer, group_column=given.group_column, max_rows=given.rows)
    batches = make_batches(texts, tokenizer, model, batch_size=given.batch_size, max_length=given.max_length)
    made = routing_report(model, batches, tokenizer=tokenizer, history=folder, title=folder.name)
    path = made.save(output, plots=False if given.no_plots else None)
    for advice in made.advice:
        print(f"{advice.title}: {advice.evidence}. {advice.action}")
    print(f"report      {path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    """What the verb takes."""
    parser = argparse.ArgumentParser(
        prog="moe-peft report",
        description="Run the adapted model on texts, and write a page on what its routers decide: load, importance, "
        "entropy, groups, change over training, tokens in context, similarity of experts, and what to do.",
        allow_abbrev=False,
    )
    parser.add_argument("--adapter", required=True, help="folder of an adapter, or its name on the Hub")
    parser.add_argument(
        "--data",
        required=True,
        action="append",
        metavar="FILE",
        help="JSON lines with messages, text, or prompt and completion; give it several times to compare files",
    )
    parser.add_argument("--base", help="base model, a name on the Hub or a folder; default: the adapter's own")
    parser.add_argument(
        "--group-column", "--group_column", metavar="G", help="column with each row's group; default: each file is one"
    )
    parser.add_argument("--output", metavar="FOLDER", help="where to write; default: routing_report in the adapter")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"rows of each group; default: {ROWS}")
    parser.add_argument("--max-length", type=int, default=LENGTH, help=f"tokens of a row; default: {LENGTH}")
    parser.add_argument("--batch-size", type=int, default=BATCH, help=f"rows of a batch; default: {BATCH}")
    parser.add_argument("--no-plots", action="store_true", help="write no PNG files, which need matplotlib")
    return parser
