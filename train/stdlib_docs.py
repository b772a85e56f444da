"""Instruction pairs and plain text from the documentation of the Python standard library that is running.

Real text without a download. Every public function, class and method with a docstring gives one pair of each group:

    group 1 (knowledge): "Summary of math.asin(x, /):"  -> " Return the arc sine (measured in radians) of x."
    group 0 (task):      "Locate math.asin(x, /):"      -> " function asin in module math"

Nothing runs except the imports. The order is sorted and the split is a hash of the qualified name, so two runs of the
same interpreter write the same bytes.
"""

import argparse
import contextlib
import hashlib
import importlib
import inspect
import io
import json
import pkgutil
import re
import sys
import types
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

TASK_GROUP, KNOWLEDGE_GROUP = 0, 1

# Modules whose import opens a browser, prints, needs a display or changes the interpreter (`rlcompleter` installs a
# completer, `distutils` may be replaced by setuptools), and modules that only hold tests or bundled tools.
SKIPPED_MODULES = {"antigravity", "this", "rlcompleter", "distutils", "turtle", "tkinter", "idlelib", "turtledemo"}
SKIPPED_MODULES |= {"lib2to3", "ensurepip"}
SKIPPED_PARTS = {"test", "tests"}

FILE_NAMES = ("pretrain.jsonl", "pretrain_test.jsonl", "train.jsonl", "test.jsonl")
HELD_OUT_PERCENT = 5
MAX_SIGNATURE_CHARS = 100
MAX_SENTENCE_CHARS = 160
MIN_SENTENCE_CHARS = 12

_CALL_LINE = re.compile(r"^\S+\(.*\)(\s*->.*)?$")
_SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!etc)[.!?](?=\s+[^a-z]|$)")


class Entry(NamedTuple):
    """One documented object of the standard library.

    Attributes:
        name: Qualified public name, `module.function` or `module.Class.method`.
        module: Name of the module that holds it.
        kind: "function", "class", "method" or "property".
        signature: Parameters in parentheses on one line, or "" where the interpreter does not know them.
        sentence: First sentence of the docstring, on one line.
        doc: Whole docstring, without its indentation.
    """

    name: str
    module: str
    kind: str
    signature: str
    sentence: str
    doc: str


class _Elided:
    """A default value that is not worth showing, or that differs between machines (`os.environ`, open files)."""

    def __repr__(self) -> str:
        return "..."


def import_public_modules() -> dict[str, types.ModuleType]:
    """Import every public module of the standard library that can be imported quietly.

    Returns:
        Module by dotted name, sorted by name. Modules that fail to import or that print are left out.
    """
    modules: dict[str, types.ModuleType] = {}
    pending = sorted(sys.stdlib_module_names, reverse=True)
    while pending:
        name = pending.pop()
        if _is_skipped(name):
            continue
        module = _import_quietly(name)
        if module is not None:
            modules[name] = module
            children = pkgutil.iter_modules(getattr(module, "__path__", []))
            pending.extend(sorted((f"{name}.{child.name}" for child in children), reverse=True))
    return dict(sorted(modules.items()))


def _is_skipped(name: str) -> bool:
    parts = name.split(".")
    return parts[0] in SKIPPED_MODULES or any(part.startswith("_") or part in SKIPPED_PARTS for part in parts)


def _import_quietly(name: str) -> types.ModuleType | None:
    stdout, stderr = io.StringIO(), io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        warnings.simplefilter("ignore")
        try:
            module = importlib.import_module(name)
        # A module for another platform may raise anything, SystemExit included.
        except (Exception, SystemExit):
            return None
    return None if stdout.getvalue() else module


def collect_entries() -> list[Entry]:
    """Collect the documented public objects of the standard library.

    Objects that are reachable under several names count once, and so do docstrings with the same first sentence:
    otherwise the sentence of a held-out name could be read off a training name.

    Returns:
        Entries sorted by qualified name.
    """
    entries: dict[str, Entry] = {}
    seen_sentences: set[str] = set()
    seen_objects: set[int] = set()
    for module_name, module in import_public_modules().items():
        for name, kind, value in _public_objects(module_name, module):
            if id(value) in seen_objects:
                continue
            seen_objects.add(id(value))
            entry = _make_entry(name, module_name, kind, value)
            if entry is not None and entry.sentence.lower() not in seen_sentences:
                seen_sentences.add(entry.sentence.lower())
                entries[name] = entry
    return [entries[name] for name in sorted(entries)]


def _public_objects(module_name: str, module: types.ModuleType) -> Iterator[tuple[str, str, Any]]:
    """Yield (qualified name, kind, object) for the functions, classes and methods a module calls its own."""
    exported = getattr(module, "__all__", None)
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        # Without `__all__` an imported helper looks like a public name; its home module gives it away.
        is_own = name in exported if exported is not None else getattr(value, "__module__", None) == module_name
        if not is_own:
            continue
        if not inspect.isclass(value):
            yield f"{module_name}.{name}", "function", value
            continue
        yield f"{module_name}.{name}", "class", value
        for member_name, member in sorted(vars(value).items()):
            if isinstance(member, staticmethod | classmethod):
                member = member.__func__
            if not member_name.startswith("_") and (inspect.isroutine(member) or isinstance(member, property)):
                kind = "property" if isinstance(member, property) else "method"
                yield f"{module_name}.{name}.{member_name}", kind, member


def _make_entry(name: str, module: str, kind: str, value: Any) -> Entry | None:
    doc = value.__doc__
    if not isinstance(doc, str):
        return None
    doc = inspect.cleandoc(doc)
    sentence = first_sentence(doc)
    if not MIN_SENTENCE_CHARS <= len(sentence) <= MAX_SENTENCE_CHARS:
        return None
    return Entry(name, module, kind, "" if kind == "property" else signature_text(value), sentence, doc)


def first_sentence(doc: str) -> str:
    """Return the first sentence of a docstring on one line.

    Args:
        doc: Docstring without indentation. Leading lines that only repeat the call (`range(stop) -> range object`)
            are passed over.

    Returns:
        The sentence with its full stop, or "" if there is none.
    """
    lines = doc.split("\n")
    while lines and (not lines[0].strip() or _CALL_LINE.match(lines[0].strip())):
        lines.pop(0)
    paragraph = " ".join("\n".join(lines).split("\n\n")[0].split())
    end = _SENTENCE_END.search(paragraph)
    return paragraph[: end.end()] if end else paragraph


def signature_text(value: Any) -> str:
    """Return the parameters of a callable on one line, without annotations.

    Args:
        value: Function, class or method.

    Returns:
        For example "(a, /, key=None)"; "" if unknown, "(...)" if longer than `MAX_SIGNATURE_CHARS` characters.
    """
    try:
        signature = inspect.signature(value)
    # Annotations and text signatures are evaluated here, so a foreign class may raise anything.
    except Exception:
        return ""
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty, default=_shown_default(parameter.default))
        for parameter in signature.parameters.values()
    ]
    text = str(inspect.Signature(parameters))
    return text if len(text) <= MAX_SIGNATURE_CHARS else "(...)"


def _shown_default(default: Any) -> Any:
    if default is inspect.Parameter.empty or default is None:
        return default
    is_plain = type(default) in (bool, int, float, str, bytes)
    return default if is_plain and len(repr(default)) <= 16 else _Elided()


def is_held_out(name: str) -> bool:
    """Say whether a qualified name belongs to the test split (`HELD_OUT_PERCENT` of the names, by hash)."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def instruction_pairs(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """Turn entries into prompt/completion rows, one of each group per entry.

    Args:
        entries: Documented objects.

    Returns:
        Rows `{"prompt": str, "completion": str, "task_type": int}`; both texts are one line, the completion starts
        with the space that separates it from the prompt.
    """
    rows = []
    for entry in entries:
        rows.append(_row(f"Summary of {entry.name}{entry.signature}:", entry.sentence, KNOWLEDGE_GROUP))
        rows.append(_row(f"Locate {entry.name}{entry.signature}:", _location(entry), TASK_GROUP))
    return rows


def _row(prompt: str, completion: str, group: int) -> dict[str, Any]:
    return {"prompt": prompt, "completion": f" {completion}", "task_type": group}


def _location(entry: Entry) -> str:
    owner, _, short_name = entry.name.removeprefix(f"{entry.module}.").rpartition(".")
    place = f"class {owner} of module {entry.module}" if owner else f"module {entry.module}"
    return f"{entry.kind} {short_name} in {place}"


def entry_texts(entries: Iterable[Entry]) -> list[str]:
    """Return one plain text per entry: name and signature, then the whole docstring."""
    return [f"{entry.name}{entry.signature}\n\n{entry.doc}\n" for entry in entries]


def pretraining_texts(entries: Iterable[Entry] | None = None) -> list[str]:
    """Return the plain text to pretrain on: help topics and the docstrings of the training split.

    Args:
        entries: Documented objects; default all of the standard library. Held-out names are left out.

    Returns:
        One text per help topic and per name.
    """
    from pydoc_data.topics import topics

    entries = collect_entries() if entries is None else entries
    training_texts = entry_texts(entry for entry in entries if not is_held_out(entry.name))
    return [topics[name] for name in sorted(topics)] + training_texts


def write_splits(output_dir: str | Path) -> dict[str, int]:
    """Write the data as JSON lines.

    Args:
        output_dir: Folder that receives `pretrain.jsonl` and `pretrain_test.jsonl` (`{"text"}`), `train.jsonl` and
            `test.jsonl` (`{"prompt", "completion", "task_type"}`). No name occurs in both splits.

    Returns:
        Number of rows by file name.
    """
    entries = collect_entries()
    held_out = [entry for entry in entries if is_held_out(entry.name)]
    training = [entry for entry in entries if not is_held_out(entry.name)]
    tables = [
        [{"text": text} for text in pretraining_texts(entries)],
        [{"text": text} for text in entry_texts(held_out)],
        instruction_pairs(training),
        instruction_pairs(held_out),
    ]
    files = dict(zip(FILE_NAMES, tables, strict=True))
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    for file_name, rows in files.items():
        unfinished = output_dir / f"{file_name}.tmp"
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        unfinished.replace(output_dir / file_name)
    return {file_name: len(rows) for file_name, rows in files.items()}


def main() -> None:
    """Write the data and print how many rows each file has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default=".cache/quickstart/data", help="folder for the JSON lines files")
    args = parser.parse_args()
    for file_name, num_rows in write_splits(args.output_dir).items():
        print(f"{file_name}: {num_rows} rows")


if __name__ == "__main__":
    main()
