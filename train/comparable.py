"""What can be compared: the methods of a command line, and whether their runs have model, data and length alike."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import moe_config
from dry_run import check_model_name
from trainer_numbers import check_numbers
from training import prepare_data

from moe_peft.messages import shown

# What the runs of a comparison must have in common.
SHARED = ["model_name_or_path", "model_revision", "dataset_name", "dataset_config", "datasets", "test_split_size"]
SHARED += ["dataset_train_split", "dataset_test_split", "max_steps", "num_train_epochs", "per_device_train_batch_size"]
SHARED += ["gradient_accumulation_steps", "max_length", "packing", "load_in_4bit", "load_in_8bit", "dtype"]


@dataclass(frozen=True)
class Arm:
    """One of the methods that are compared.

    Attributes:
        name: Short, for the table.
        words: Of the script's command line.
    """

    name: str
    words: list[str]


def arms_of(runs: list[str], methods: list[str], rest: list[str]) -> list[Arm]:
    """The methods that are compared: every method file with every run file.

    Args:
        runs: Values of `--config`.
        methods: Values of `--moe_config`.
        rest: Words of every run.

    Raises:
        ValueError: Nothing is given, or two have one name.
    """
    if not runs and not methods:
        raise ValueError("Give --config with a run's file or name, twice and more, or --moe_config beside it.")
    arms: list[Arm] = []
    for run_file in runs or [None]:
        for method in methods or [None]:
            parts = [(run_file, len(runs) > 1 or not methods), (method, True)]
            name = "-".join(Path(part).stem for part, counts in parts if part is not None and counts)
            words = [] if run_file is None else ["--config", run_file]
            arms.append(Arm(name, [*words, *([] if method is None else ["--moe_config", method]), *rest]))
    names = [arm.name for arm in arms]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"Two of the files are called {twice!r}, which names a row of the table. Rename one.")
    return arms


def parse(script: str, arm: Arm) -> tuple[Any, ...]:
    """What a script's parser makes of a method's words.

    Args:
        script: "sft", "dpo", ...
        arm: The method.

    Raises:
        ValueError: Something means nothing to the script; the method is named.
    """
    try:
        return importlib.import_module(script).make_parser().parse_args_and_config(list(arm.words))
    except ValueError as error:
        raise ValueError(f"{arm.name}: {error}") from error


def check_shared(parsed: dict[str, tuple[Any, ...]]) -> None:
    """Refuse runs that differ in data, model or length.

    Args:
        parsed: Method -> what its script's parser returned.

    Raises:
        ValueError: They do; the setting and both values are named.
    """
    (first, own), *others = parsed.items()
    for name in SHARED:
        value = _setting(own, name)
        for other, theirs in others:
            if _setting(theirs, name) != value:
                raise ValueError(
                    f"{first} and {other} cannot be compared: {name} is {shown(value)} in one and "
                    f"{shown(_setting(theirs, name))} in the other. Give --{name} on the command line, which counts "
                    "for both."
                )


def check_runs(parsed: dict[str, tuple[Any, ...]], script: str) -> None:
    """Read the model's name, the numbers and the data as every run will, so that no run begins that cannot end.

    Args:
        parsed: Method -> what its script's parser returned.
        script: "sft", "dpo", ...

    Raises:
        ValueError: The model or the data is not there, or something in them is not as the script needs it.
    """
    for script_args, training_args, model_args, dataset_args, *_, moe_args in parsed.values():
        check_model_name(model_args.model_name_or_path)
        check_numbers(training_args)
        config = moe_config(moe_args, task_of(script))
        prepare_data(script, model_args, training_args, (script_args, dataset_args), config, evaluates=True)


def task_of(script: str) -> str:
    """The task type of peft of what a script trains.

    Args:
        script: "sft", "dpo", ...
    """
    return "SEQ_CLS" if script == "reward" else "CAUSAL_LM"


def _setting(parsed: tuple[Any, ...], name: str) -> Any:
    return next((getattr(own, name) for own in parsed if hasattr(own, name)), None)
