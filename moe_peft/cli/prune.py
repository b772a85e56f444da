"""`moe-peft prune`: a smaller adapter, and what it loses."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..config.adapter_files import read_json_object
from ..files import check_free
from ..tools.prune_experts import BY, prune_experts
from .distil import batches
from .inspect import local_folder
from .made import BEFORE, MADE, save_made
from .route import load


def run(argv: list[str]) -> int:
    """Write the smaller adapter and print what it loses.

    Args:
        argv: The words after the verb.

    Raises:
        ValueError: The adapter, its base model or the texts are missing, or nothing can be left out; nothing has been
            written.
    """
    given = _parser().parse_args(argv)
    check_free(given.output)
    folder = local_folder(given.adapter)
    model, tokenizer = load(folder, given.base, adapter_name=BEFORE)
    further: dict[str, Any] = {}
    if given.by == "scores":
        further["scores"] = None if given.scores is None else read_json_object(given.scores)
    elif given.by == "router_change":
        further["initial_norms"] = given.history or folder
    texts = batches(Path(given.texts), tokenizer)
    made = prune_experts(
        model, MADE, given.keep, texts, by=given.by, merge=given.merge, adapter_name=BEFORE, **further
    )
    save_made(model, given.output, folder, finish=made.write_card)
    if given.json:
        print(json.dumps({"kept": made.kept, "merged": made.merged, **made.difference.metrics()}))
    else:
        config: Any = model.peft_config[MADE]
        print(f"{given.output}: {config.summary()}: {made.difference}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moe-peft prune",
        description="Keep the experts of a routed adapter that matter most at each place. It is an approximation, "
        "whose loss on the texts is printed and written into the card.",
        allow_abbrev=False,
    )
    parser.add_argument("adapter", help="folder of an adapter, or its name on the Hub")
    parser.add_argument("--keep", required=True, type=int, metavar="N", help="experts of each place that stay")
    parser.add_argument("--texts", required=True, metavar="FILE", help="a text per line, of the task to serve")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to make")
    parser.add_argument("--by", choices=BY, default=BY[0], help=f"what an expert counts by; default: {BY[0]}")
    parser.add_argument("--scores", metavar="FILE", help="by scores: JSON, from each place to a number per expert")
    parser.add_argument(
        "--history", metavar="FOLDER", help="by router_change: folder of the run's history; default: the adapter's"
    )
    parser.add_argument("--merge", action="store_true", help="merge the other experts into the kept ones")
    parser.add_argument("--base", help="base model, a name on the Hub or a folder; default: the adapter's own")
    parser.add_argument("--json", action="store_true", help="print which experts stay, and the figures, as JSON")
    return parser
