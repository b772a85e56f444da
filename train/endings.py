"""How a run begins and ends in its folder: an earlier adapter is kept, and the last lines say what to do next."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

from checkpoints import CHECKPOINT, last_complete
from peft import PeftModel

from moe_peft.cli.errors import INTERRUPTED
from moe_peft.config.card_section import AUTO_CLASSES

# What a run writes into its folder.
WRITTEN = re.compile(
    rf"adapter_.*|README\.md|routing_history\.safetensors|training_args\.bin|{CHECKPOINT.pattern}"
    r"|(generation_)?config\.json|model.*\.safetensors(\.index\.json)?"
)
# What a finished run leaves: an adapter, or a whole model.
FINISHED = ("adapter_config.json", "config.json")
PREVIOUS = "previous"


def check_output(output_dir: str) -> None:
    """Refuse a file where the output folder is meant.

    Args:
        output_dir: The value of `--output_dir`.

    Raises:
        ValueError: It is one.
    """
    if Path(output_dir).is_file():
        raise ValueError(f"--output_dir {output_dir} is a file. Name a folder, which is made where it does not exist.")


def make_room(training_args: Any, *, overwrite: bool) -> None:
    """Move what an earlier run left in the output folder into a folder in it, and say so; a resumed run goes on in it.

    Args:
        training_args: The trainer's arguments.
        overwrite: Delete it instead.
    """
    folder = Path(training_args.output_dir)
    if (
        training_args.resume_from_checkpoint
        or training_args.process_index != 0
        or not any((folder / name).is_file() for name in FINISHED)
    ):
        return
    left = [path for path in folder.iterdir() if WRITTEN.fullmatch(path.name)]
    if overwrite:
        for path in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        print(f"Deleted what an earlier run left in {folder}.", flush=True)
        return
    number = 1
    while (folder / f"{PREVIOUS}-{number}").exists():
        number += 1
    aside = folder / f"{PREVIOUS}-{number}"
    aside.mkdir()
    for path in left:
        path.rename(aside / path.name)
    print(f"{folder} held what an earlier run left, which is kept in {aside}.", flush=True)


def interrupted(training_args: Any) -> None:
    """Say after Ctrl-C what is saved and how to go on, and end.

    Args:
        training_args: The trainer's arguments.

    Raises:
        SystemExit: Always, with 130.
    """
    if training_args.process_index == 0:
        found, _ = last_complete(Path(training_args.output_dir))
        if found is None:
            text = f"Interrupted. There is no checkpoint in {training_args.output_dir} yet, so nothing was saved."
        else:
            text = (
                f"Interrupted. The last whole checkpoint is {found}; go on from it with the same command and "
                "--resume_from_checkpoint true."
            )
        print(text, file=sys.stderr, flush=True)
    raise SystemExit(INTERRUPTED)


def finished(trainer: Any, *, ours: bool = True) -> str:
    """Where the adapter lies, and the lines that load it.

    Args:
        trainer: A trainer whose adapter, or model, has been saved.
        ours: Whether its type is one of ours.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    whole = not isinstance(model, PeftModel)
    task_type = head_of(model) if whole else model.peft_config[model.active_adapter].task_type
    auto_class = AUTO_CLASSES.get(str(getattr(task_type, "value", task_type)), "AutoModel")
    if not whole:
        auto_class = auto_class.replace("AutoModel", "AutoPeftModel", 1)
    head = ", num_labels=1" if task_type == "SEQ_CLS" else ""
    folder = trainer.args.output_dir
    lines = [
        *(["import moe_peft"] if ours else []),
        f"from {'transformers' if whole else 'peft'} import {auto_class}",
        f'model = {auto_class}.from_pretrained("{folder}"{head})',
    ]
    text = "\n".join(
        [f"\nThe {'model' if whole else 'adapter'} is in {folder}. To load it:\n", *(f"    {line}" for line in lines)]
    )
    return f"{text}\n\nWhat it is, and whether it is healthy: moe-peft inspect {folder}" if ours else text


def head_of(model: Any) -> str:
    """The task type, in peft's words, of a model without an adapter.

    Args:
        model: A model of transformers.
    """
    return "SEQ_CLS" if type(model).__name__.endswith("ForSequenceClassification") else "CAUSAL_LM"
