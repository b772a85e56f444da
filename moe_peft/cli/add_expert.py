"""`moe-peft add-expert`: a saved adapter with one expert more."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..files import check_free
from ..messages import shown
from ..tools.add_expert import add_expert
from .inspect import local_folder
from .made import BEFORE, MADE, save_made
from .route import load


def run(argv: list[str]) -> int:
    """Write the larger adapter.

    Args:
        argv: The words after the verb.

    Raises:
        ValueError: The adapter or its base model is not found, or the expert does not fit; nothing has been written.
    """
    parser = argparse.ArgumentParser(
        prog="moe-peft add-expert",
        description="Give a routed adapter one expert more, which comes last: one that adds nothing until it is "
        "trained, a copy of another expert, or a LoRA.",
        allow_abbrev=False,
    )
    parser.add_argument("adapter", help="folder of an adapter, or its name on the Hub")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to make")
    parser.add_argument("--lora", help="folder of a LoRA that the new expert equals, or its name on the Hub")
    parser.add_argument("--copy_of", type=int, metavar="N", help="number of the expert that the new one equals")
    parser.add_argument(
        "--description",
        metavar="FILE",
        help="JSON list of numbers that describe the new expert, for a router that makes its rows of descriptions",
    )
    parser.add_argument("--base", help="base model, a name on the Hub or a folder; default: the adapter's own")
    given = parser.parse_args(argv)
    check_free(given.output)
    vector = None if given.description is None else _numbers(Path(given.description))
    folder = local_folder(given.adapter)
    model, _ = load(folder, given.base, adapter_name=BEFORE)
    settings = {"lora": given.lora, "copy_of": given.copy_of, "description": vector}
    add_expert(model, MADE, **settings, adapter_name=BEFORE)
    save_made(model, given.output, folder)
    config: Any = model.peft_config[MADE]
    print(f"{given.output}: {config.summary()}")
    return 0


def _numbers(path: Path) -> list[float]:
    """The numbers of a description."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--description {path} is not valid JSON ({shown(str(error))}).") from error
    if not isinstance(found, list) or not found or any(type(own) not in (int, float) for own in found):
        raise ValueError(f"--description {path} holds {shown(found)}, and a list of numbers is needed.")
    return [float(own) for own in found]
