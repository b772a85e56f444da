"""`moe-peft import`: adapters in the files of others as adapters of this package."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..config.adapter_files import CONFIG, read_json_object
from ..files import check_free, new_folder
from ..tools.esft_files import SELECTION, import_esft
from ..tools.expert_lora_files import import_expert_lora
from ..tools.mixture_files import import_mixture


def run(argv: list[str]) -> int:
    """Read an adapter of others and save it in our form.

    Args:
        argv: The words after the verb.

    Raises:
        ValueError: The folder is of no known form, or does not fit the base model; nothing has been written.
    """
    parser = argparse.ArgumentParser(
        prog="moe-peft import",
        description="Read an adapter in the files of ESFT's authors, of stock peft (LoRA on experts), of MixLoRA or "
        "MoE-PEFT, and save it as an adapter of this package that computes the same.",
        allow_abbrev=False,
    )
    parser.add_argument("adapter", help="local folder of the adapter")
    parser.add_argument("--base", required=True, help="base model, a name on the Hub or a folder")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to make")
    given = parser.parse_args(argv)
    check_free(given.output)
    folder = Path(given.adapter)
    read = reader_of(folder)
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(given.base, dtype="auto")
    model = read(base, str(folder))
    with new_folder(given.output) as growing:
        model.save_pretrained(str(growing))
    print(f"{given.output} holds {', '.join(model.peft_config)}")
    return 0


def reader_of(folder: Path) -> Any:
    """What reads the files of a folder.

    Args:
        folder: Of an adapter.

    Raises:
        ValueError: They are of no known form.
    """
    if (folder / SELECTION).is_file():
        return import_esft
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} holds neither {SELECTION} nor {CONFIG}. Name the folder of an adapter.")
    settings = read_json_object(folder / CONFIG)
    if settings.get("peft_type") != "LORA":
        return import_mixture
    if settings.get("target_parameters"):
        return import_expert_lora
    raise ValueError(
        f"{folder} holds a LoRA of linear layers, which needs no import: peft loads it, `moe-peft compose` makes "
        "experts of several, and `moe-peft upcycle` of one."
    )
