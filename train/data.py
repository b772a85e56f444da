"""The data of a run, checked before a model is loaded: files as people have them, with a trainer's columns."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import ScriptArguments

from moe_peft.messages import shown

# Ending of a file -> the builder of `datasets` that reads it.
BUILDERS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
# Script -> sets of columns of which the data must have one whole.
SFT_COLUMNS = (("messages",), ("text",), ("prompt", "completion"))
COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "sft": SFT_COLUMNS,
    "dpo": (("chosen", "rejected"),),
    "kto": (("prompt", "completion", "label"), ("chosen", "rejected")),
    "reward": (("chosen", "rejected"),),
    "grpo": (("prompt",),),
    "rloo": (("prompt",),),
    "select_experts": SFT_COLUMNS,
}
EXAMPLES = {
    "sft": '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}',
    "dpo": '{"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}',
    "kto": '{"prompt": "The sky is", "completion": " blue.", "label": true}',
    "reward": '{"chosen": "The sky is blue.", "rejected": "The sky is green."}',
    "grpo": '{"prompt": "What is 2 + 2?"}',
}
EXAMPLES |= {"rloo": EXAMPLES["grpo"], "select_experts": EXAMPLES["sft"]}
# Columns that tokenization has made already.
TOKENIZED = "input_ids"
START = 1 << 20  # bytes of a file that are looked at before it is read
CONVERT = "Convert it, as with `iconv -f latin1 -t utf-8`."


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
            raise ValueError(f"--dataset_name {name}: the folder holds no file of a kind that is read: {_kinds()}.")
        for file in files:
            _check_start(file)
        with _Explained(files):
            return load_dataset(name, name=script_args.dataset_config, streaming=script_args.dataset_streaming)
    if path.suffix in BUILDERS or path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise ValueError(f"--dataset_name {name}: there is no such file or folder. Kinds of files: {_kinds()}.")
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
            raise ValueError(f"--dataset_name {file}: files of this kind are not read. Kinds of files: {_kinds()}.")
        _check_start(file)
    builders = {BUILDERS[file.suffix] for file in files}
    if len(builders) > 1:
        raise ValueError(f"--dataset_name: files of several kinds ({', '.join(sorted(builders))}). Give one kind.")
    options = {"delimiter": "\t"} if files[0].suffix == ".tsv" else {}
    with _Explained(files):
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


def check_columns(script: str, rows: Any, training_args: Any, name: str) -> None:
    """Refuse rows without the columns that a trainer reads, or with holes in them.

    Args:
        script: "sft", "dpo", ...
        rows: A `Dataset`, or a streamed one.
        training_args: The trainer's arguments; those of SFT may name another column of text.
        name: Where the data is from, for the message.

    Raises:
        ValueError: Columns are missing, or empty in a row; what was found, what is needed and an example are shown.
    """
    found = rows.column_names
    if found is None or TOKENIZED in found:
        return
    if not found or (hasattr(rows, "__len__") and len(rows) == 0):
        raise ValueError(f"{name} has no rows.")
    text = getattr(training_args, "dataset_text_field", "text")
    wanted = [tuple(text if column == "text" else column for column in columns) for columns in COLUMNS[script]]
    fitting = [columns for columns in wanted if set(columns) <= set(found)]
    if not fitting:
        needed = ", or ".join(" and ".join(columns) for columns in wanted)
        raise ValueError(
            f"{name} has the columns {', '.join(found)}, but {script} needs {needed}. A row looks like "
            f"{EXAMPLES[script]}; the first row is {shown(next(iter(rows)))}."
        )
    for column in fitting[0]:
        row = _first_hole(rows, column)
        if row is not None:
            raise ValueError(f"{name}: row {row + 1} has no {column!r}. Fill it in, or take the row out.")


def check_template(rows: Any, tokenizer: Any, training_args: Any, name: str) -> None:
    """Refuse conversations for a tokenizer that does not know how to write them.

    Args:
        rows: The rows to train on.
        tokenizer: Of the model.
        training_args: The trainer's arguments.
        name: Name of the model, for the message.

    Raises:
        ValueError: There is no chat template.
    """
    if getattr(tokenizer, "chat_template", None) or getattr(training_args, "chat_template_path", None):
        return
    row = next(iter(rows))
    talks = [column for column in ("messages", "prompt", "chosen", "completion") if is_conversation(row.get(column))]
    if talks:
        way = "Give --chat_template_path with a .jinja file or the name of a model that has one"
        if not hasattr(training_args, "chat_template_path"):
            way = "Save the model's tokenizer with a chat_template"
        raise ValueError(
            f"The column {talks[0]!r} holds conversations, but {name} has no chat template to write them with. {way}, "
            "or give texts instead."
        )


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) and "role" in value[0]


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


def _kinds() -> str:
    return ", ".join(sorted(BUILDERS))


def _check_start(file: Path) -> None:
    """Refuse an empty file, and text in another encoding, which would be read as other letters without a word."""
    with open(file, "rb") as content:
        start = content.read(START)
    if not start.strip():
        raise ValueError(f"{file} is empty: there is nothing to train on.")
    if BUILDERS[file.suffix] == "parquet":
        return
    try:
        # The last letter may be cut in two.
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not in UTF-8: byte {error.start}. {CONVERT}") from error


def _first_hole(rows: Any, column: str) -> int | None:
    """Index of the first row whose value is missing; streamed rows are not searched."""
    table = getattr(rows, "data", None)
    if table is None or table.column(column).null_count == 0:
        return None
    return next((index for index, value in enumerate(rows[column]) if value is None), None)


class _Explained:
    """Turns what goes wrong while files are read into one line that names the file and its line."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if not isinstance(error, Exception):
            return
        for file in self.files:
            reason = why_broken(file)
            if reason is not None:
                raise ValueError(f"{file}{reason}") from error
        causes = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{', '.join(map(str, self.files))} cannot be read: {causes}") from error


def why_broken(file: Path) -> str | None:
    """Find the line with which a file of JSON or CSV cannot be read.

    Args:
        file: The file.

    Returns:
        What to put behind its name; None where nothing is found.
    """
    reader = {"json": _json_fault, "csv": _csv_fault}.get(BUILDERS[file.suffix])
    if reader is None:
        return None
    try:
        return reader(file)
    except UnicodeDecodeError as error:
        return f" is not in UTF-8: byte {error.start}. {CONVERT}"


def _json_fault(file: Path) -> str | None:
    if file.suffix == ".json":
        try:
            rows = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":  # one object per line
                return f", line {error.lineno}: {error.msg}."
        else:
            return None if isinstance(rows, (list, dict)) else f" holds {shown(rows)}, not a list of objects."
    kinds: dict[str, tuple[str, int]] = {}
    for number, line in _lines(file):
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            return f", line {number} is no JSON ({getattr(error, 'msg', error)}): {shown(line.strip())}"
        if not isinstance(row, dict):
            return f", line {number} holds {shown(row)}, not an object as {EXAMPLES['dpo']}"
        for key, value in row.items():
            kind = _kind(value)
            first, where = kinds.setdefault(key, (kind, number)) if kind else (kind, number)
            if kind and kind != first:
                return f", line {number}: {key!r} is {kind}, but {first} in line {where}. Give all rows the same kind."
    return None


def _kind(value: Any) -> str:
    if value is None:
        return ""
    kinds = {str: "text", bool: "true or false", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")


def _csv_fault(file: Path) -> str | None:
    with open(file, encoding="utf-8", newline="") as content:
        reader = csv.reader(content, delimiter="\t" if file.suffix == ".tsv" else ",")
        header = next(reader, [])
        for row in reader:
            if len(row) > len(header):
                return f", line {reader.line_num} has {len(row)} fields, but the header names {len(header)}."
    return None


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    with open(file, encoding="utf-8") as content:
        for number, line in enumerate(content, start=1):
            if line.strip():
                yield number, line
