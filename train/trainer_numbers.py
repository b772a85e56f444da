"""Numbers of the trainer with which no run can be made, said before a model is loaded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from moe_peft.messages import shown

# Name -> the least value; those in ABOVE must be larger than it. None is left to the trainer.
LEAST: dict[str, float] = {
    "learning_rate": 0,
    "num_train_epochs": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_length": 1,
    "max_completion_length": 1,
    "logging_steps": 0,
    "save_steps": 0,
    "eval_steps": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "dataloader_num_workers": 0,
}
ABOVE = {"learning_rate", "num_train_epochs", "logging_steps", "save_steps", "eval_steps"}
# Endings by which TRL takes a chat template for a file; all else is a tokenizer.
TEMPLATES = (".jinja", ".j2")


def check_numbers(training_args: Any) -> None:
    """Refuse numbers out of their range.

    Args:
        training_args: The trainer's arguments.

    Raises:
        ValueError: One is; its flag and its range are named.
    """
    if training_args.max_steps == 0 or training_args.max_steps < -1:
        raise ValueError(f"--max_steps {training_args.max_steps} must be at least 1, or -1 for --num_train_epochs.")
    for name, least in LEAST.items():
        value = getattr(training_args, name, None)
        if not isinstance(value, (int, float)) or (name == "num_train_epochs" and training_args.max_steps > 0):
            continue
        above = name in ABOVE
        if not math.isfinite(value) or value < least or (above and value == least):
            raise ValueError(f"--{name} {value:g} must be {'above' if above else 'at least'} {least:g}.")


def check_template_path(path: str | None) -> None:
    """Refuse a chat template that is not there.

    Args:
        path: The value of `--chat_template_path`: a file, a folder with a tokenizer, or a name on the Hub.

    Raises:
        ValueError: It is written as a path, and there is none.
    """
    if path is None or Path(path).exists():
        return
    if path.endswith(TEMPLATES) or Path(path).is_absolute() or path.startswith((".", "~")) or path.count("/") > 1:
        raise ValueError(
            f"--chat_template_path {shown(path)}: there is no such file. Give a .jinja file, or the folder or the "
            "name on the Hub of a tokenizer that has a template."
        )
