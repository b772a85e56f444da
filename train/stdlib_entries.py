"""Documented public objects of the Python standard library that is running.

Nothing runs except the imports, and they happen in a fresh child process: libraries that are already loaded here patch
the standard library (transformers adds methods to `logging.Logger`, pytest replaces `pdb.set_trace`), and hundreds of
imports would stay loaded. So two runs of the same interpreter collect the same entries in the same order.
"""

import contextlib
import importlib
import inspect
import io
import json
import pkgutil
import re
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

# Modules whose import opens a browser, prints, needs a display or changes the interpreter (`rlcompleter` installs a
# completer, `distutils` may be replaced by setuptools), and modules that only hold tests or bundled tools.
SKIPPED_MODULES = {"antigravity", "this", "rlcompleter", "distutils", "turtle", "tkinter", "idlelib", "turtledemo"}
SKIPPED_MODULES |= {"lib2to3", "ensurepip"}
SKIPPED_PARTS = {"test", "tests"}

MAX_SIGNATURE_CHARS = 100
MAX_SENTENCE_CHARS = 160
MIN_SENTENCE_CHARS = 16

_CALL_LINE = re.compile(r"^\S+\(.*\)(\s*->.*)?$")
_NOT_PROSE = re.compile(r"^\S*( =|\()")
_SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!etc)[.!?](?=\s+[^a-z]|$)")


class Entry(NamedTuple):
    """One documented object of the standard library.

    Attributes:
        name: Qualified public name, `module.function` or `module.Class.method`.
        kind: "function", "class", "method" or "property".
        signature: Parameters in parentheses on one line, or "" where the interpreter does not know them.
        arguments: "no", "required", "optional", "required and optional" or "unlisted".
        sentence: First sentence of the docstring, on one line.
        doc: Whole docstring, without its indentation.
    """

    name: str
    kind: str
    signature: str
    arguments: str
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
    """Collect the documented public objects of the standard library, as a fresh interpreter sees it.

    Returns:
        Entries sorted by qualified name.

    Raises:
        subprocess.CalledProcessError: If the child process fails.
    """
    # Isolated and without `site`: no site-packages, no PYTHON* variables, no patches by .pth files.
    command = [sys.executable, "-I", "-S", __file__]
    child = subprocess.run(command, check=True, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    return [Entry(*fields) for fields in json.loads(child.stdout)]


def collect_entries_here() -> list[Entry]:
    """Collect the entries in this process.

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
            entry = _make_entry(name, kind, value)
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


def _make_entry(name: str, kind: str, value: Any) -> Entry | None:
    doc = value.__doc__
    if not isinstance(doc, str):
        return None
    doc = inspect.cleandoc(doc)
    sentence = first_sentence(doc)
    if not MIN_SENTENCE_CHARS <= len(sentence) <= MAX_SENTENCE_CHARS or _NOT_PROSE.match(sentence):
        return None
    signature = None if kind == "property" else _signature(value)
    return Entry(name, kind, signature_text(signature), arguments_text(signature), sentence, doc)


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


def _signature(value: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(value)
    # Annotations and text signatures are evaluated here, so a foreign class may raise anything.
    except Exception:
        return None


def signature_text(signature: inspect.Signature | None) -> str:
    """Return a signature on one line, without annotations.

    Args:
        signature: Signature, or None where the interpreter does not know it.

    Returns:
        For example "(a, /, key=None)"; "" if unknown, "(...)" if longer than `MAX_SIGNATURE_CHARS` characters.
    """
    if signature is None:
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


def arguments_text(signature: inspect.Signature | None) -> str:
    """Say which arguments a caller may give; `self` and `cls` do not count.

    Returns:
        "no", "required", "optional", "required and optional", or "unlisted" for an unknown signature.
    """
    if signature is None:
        return "unlisted"
    given = [parameter for name, parameter in signature.parameters.items() if name not in ("self", "cls")]
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    is_optional = {p.default is not inspect.Parameter.empty or p.kind in variadic for p in given}
    words = [word for word, flag in (("required", False), ("optional", True)) if flag in is_optional]
    return " and ".join(words) or "no"


if __name__ == "__main__":
    json.dump(collect_entries_here(), sys.stdout)
