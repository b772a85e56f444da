"""`moe-peft export`: an adapter as files that load without this package."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..hub.card import is_hub_name
from ..tools.average_experts import average_experts
from ..tools.esft_files import export_esft
from ..tools.expert_lora_files import export_per_expert
from ..tools.export_lora import export_lora
from ..tools.export_merged import OTHER_WEIGHTS, export_merged
from ..tools.health import read_config
from ..tools.projections import PROJECTIONS
from ..tools.without_base import load_without_base
from .inspect import local_folder

FORMS = {
    "lora": "a stock LoRA adapter that equals it",
    "merged": "the base model's checkpoint with the adapter merged into it",
    "experts": "tensors for each expert: as engines load LoRA on experts, or the ESFT authors' form",
}


def run(argv: list[str]) -> int:
    """Write an adapter in another form.

    Args:
        argv: The words after the verb.

    Raises:
        ValueError: The adapter has no equal of that form, or a file is missing; nothing has been written.
    """
    parser = argparse.ArgumentParser(
        prog="moe-peft export",
        description="Write an adapter in a form that loads without moe_peft, where an equal one exists.",
        allow_abbrev=False,
    )
    parser.add_argument("adapter", help="folder of an adapter, or its name on the Hub")
    parser.add_argument(
        "--to", required=True, choices=FORMS, help="; ".join(f"{name}: {text}" for name, text in FORMS.items())
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to make")
    parser.add_argument("--base", help="base model, a name on the Hub or a folder; default: the adapter's own")
    parser.add_argument("--task", type=int, help="which task, of an adapter that routes by task")
    parser.add_argument(
        "--projections", nargs=3, default=PROJECTIONS, metavar="NAME", help="names of the gate, up and down matrices"
    )
    parser.add_argument(
        "--average", action="store_true", help="to lora: the mean of the experts at an expert's rank, with its error"
    )
    given = parser.parse_args(argv)
    if given.average and given.to != "lora":
        raise ValueError(f"--average makes a LoRA. Write --to lora, or leave it out of --to {given.to}.")
    folder = local_folder(given.adapter)
    base = given.base or read_config(folder).base_model_name_or_path or ""
    model = load_without_base(folder, base or None)
    if given.to == "merged":
        export_merged(model, base_folder(base), given.output, task=given.task, tokenizer=folder)
    elif given.average:
        print(average_experts(model, given.output, task=given.task))
    elif given.to == "lora":
        export_lora(model, given.output, task=given.task)
    elif hasattr(model.peft_config["default"], "expert_adapter"):
        export_esft(model, given.output)
    else:
        export_per_expert(model, given.output, projections=given.projections)
    print(f"{given.output} holds {'the mean of its experts' if given.average else FORMS[given.to]}")
    return 0


def base_folder(name: str) -> Path:
    """The folder of a base model's checkpoint, fetched from the Hub where it is none of this machine.

    Args:
        name: A folder, or a name on the Hub.

    Raises:
        ValueError: It is neither, or cannot be fetched.
    """
    if Path(name).is_dir():
        return Path(name)
    if not is_hub_name(name):
        raise ValueError(f"The base model {name} is no folder here, and no name on the Hub. Give it with --base.")
    from huggingface_hub import snapshot_download

    others = [f"*{ending}" for ending in OTHER_WEIGHTS if ending != ".safetensors"]
    try:
        return Path(snapshot_download(name, ignore_patterns=[*others, "original/*"]))
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"The base model {name} cannot be fetched from the Hub ({reason}).") from error
