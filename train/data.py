"""The data of a run: files as people have them, folders of them or names on the Hub, and their splits."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_files import BUILDERS, Explained, check_start, kinds
from trl import ScriptArguments


@dataclass
class DataArguments(ScriptArguments):
    """TRL's arguments of the data, of which `dataset_name` takes several."""

    dataset_name: list[str] | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Files (json, jsonl, csv, tsv, parquet), folders of them, or the name of a data set on the Hub; "
            "several files are joined."
        },
    )


def names_of(script_args: Any) -> list[str]:
    """What `--dataset_name` was given.

    Args:
        script_args: TRL's `ScriptArguments`, or ours.
    """
    given = script_args.dataset_name
    return [given] if isinstance(given, str) else list(given or [])


def load_data(script_args: Any, dataset_args: Any, seed: int = 0) -> Any:
    """Load the data set: `datasets:` of the YAML file, or what `--dataset_name` names.

    Args:
        script_args: `DataArguments`, or TRL's `ScriptArguments`.
        dataset_args: TRL's `DatasetMixtureConfig`, whose `test_split_size` holds rows out of files as well.
        seed: Of the rows that are held out.

    Raises:
        ValueError: Neither or both are given, there is no such file, or it cannot be read; the line is named.
    """
    from datasets import load_dataset
    from trl import get_dataset

    names = names_of(script_args)
    if bool(dataset_args.datasets) == bool(names):
        raise ValueError(
            "Give either `datasets` (in the YAML file) or `--dataset_name` (a file, a folder, or a name on the Hub), "
            "and not both."
        )
    if dataset_args.datasets:
        return get_dataset(dataset_args)
    streaming = script_args.dataset_streaming
    if all(Path(name).is_file() for name in names):
        loaded = load_files([Path(name) for name in names], streaming)
    elif len(names) > 1:
        missing = [name for name in names if not Path(name).is_file()]
        raise ValueError(f"--dataset_name {missing[0]}: several names must all be files, and there is no such file.")
    else:
        loaded = _load_one(names[0], script_args, load_dataset)
    return held_out(loaded, dataset_args.test_split_size, script_args, seed)


def _load_one(name: str, script_args: Any, load_dataset: Any) -> Any:
    """A folder, or a name on the Hub."""
    path = Path(name)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in BUILDERS)
        if not files:
            raise ValueError(f"--dataset_name {name}: the folder holds no file of a kind that is read: {kinds()}.")
        for file in files:
            check_start(file)
        with Explained(files):
            return load_dataset(name, name=script_args.dataset_config, streaming=script_args.dataset_streaming)
    if path.suffix in BUILDERS or path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise ValueError(f"--dataset_name {name}: there is no such file or folder. Kinds of files: {kinds()}.")
    try:
        return load_dataset(name, name=script_args.dataset_config, streaming=script_args.dataset_streaming)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--dataset_name {name} is no file or folder here, and cannot be loaded from the Hub: "
            f"{' '.join(str(error).split())}"
        ) from error


def load_files(files: list[Path], streaming: bool = False) -> Any:
    """Load files of one kind as the split "train".

    Args:
        files: All of one kind.
        streaming: Whether rows are read while training.

    Raises:
        ValueError: A kind is unknown, kinds differ, or a file is empty or broken.
    """
    from datasets import load_dataset

    for file in files:
        if file.suffix not in BUILDERS:
            raise ValueError(f"--dataset_name {file}: files of this kind are not read. Kinds of files: {kinds()}.")
        check_start(file)
    builders = {BUILDERS[file.suffix] for file in files}
    if len(builders) > 1:
        raise ValueError(f"--dataset_name: files of several kinds ({', '.join(sorted(builders))}). Give one kind.")
    options = {"delimiter": "\t"} if files[0].suffix == ".tsv" else {}
    with Explained(files):
        return load_dataset(builders.pop(), data_files=[str(file) for file in files], streaming=streaming, **options)


def held_out(loaded: Any, size: float | None, script_args: Any, seed: int) -> Any:
    """Split rows off for evaluation.

    Args:
        loaded: Split name -> rows.
        size: Share or number of rows; None leaves the data as it is.
        script_args: TRL's `ScriptArguments`, with the names of the splits.
        seed: Of their choice.

    Raises:
        ValueError: The data has a split of that name, is streamed, or has too few rows.
    """
    if size is None:
        return loaded
    train, test = script_args.dataset_train_split, script_args.dataset_test_split
    if test in loaded:
        raise ValueError(f"--test_split_size {size}: the data has a split {test!r} already. Leave the flag out.")
    if script_args.dataset_streaming:
        raise ValueError(f"--test_split_size {size}: rows of streamed data cannot be held out. Leave streaming off.")
    rows = loaded[train]
    count = round(size * len(rows)) if size < 1 else int(size)
    if not 0 < count < len(rows):
        raise ValueError(
            f"--test_split_size {size} holds {count} of {len(rows)} rows out. Give a share between 0 and 1, or a "
            "number of rows, that leaves some on both sides."
        )
    parts = rows.train_test_split(test_size=count, seed=seed)
    return {**loaded, train: parts["train"], test: parts["test"]}


def splits(dataset: Any, script_args: Any, evaluates: bool) -> tuple[Any, Any]:
    """The rows to train on, and those to evaluate on.

    Args:
        dataset: Split name -> rows.
        script_args: TRL's `ScriptArguments`.
        evaluates: Whether the second split is needed.

    Returns:
        Both; None for the second where it is not needed.

    Raises:
        ValueError: The data has no split of that name.
    """
    wanted = {"dataset_train_split": script_args.dataset_train_split}
    if evaluates:
        wanted["dataset_test_split"] = script_args.dataset_test_split
    for flag, name in wanted.items():
        if name not in dataset:
            raise ValueError(
                f"--{flag} {name}: the data has the splits {sorted(dataset)}. Name one of them, hold rows out with "
                "--test_split_size 0.1, or switch evaluation off with --eval_strategy no."
            )
    return dataset[script_args.dataset_train_split], dataset[wanted["dataset_test_split"]] if evaluates else None
