"""The command itself: finds the verb, runs it, and turns what a user can mend into one line."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from ..messages import shown
from .errors import INTERRUPTED, MENDABLE, one_line, wants_traceback, without_noise
from .own_parts import import_parts, named_imports, taken_out
from .verbs import LOOKING, VERBS, help_text

# Verbs whose own parser knows the files that are imported first, and the others; training scripts import themselves.
FLAGS_ALONE = ["describe"]
TAKEN_OUT = [verb for verb in LOOKING if verb not in (*FLAGS_ALONE, "run")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `moe-peft`.

    Args:
        argv: The words after the command; None takes those of this process.

    Returns:
        Exit code: 0, 1 where something is wrong with what was given, 2 for a wrong command line, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if words[0] == "--version":
        print(_version())
        return 0
    verb, rest = words[0].replace("_", "-"), words[1:]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"It has {', '.join(VERBS)}."
        print(f"moe-peft: {shown(words[0])} is no verb. {hint}", file=sys.stderr)
        return 2
    return _run(verb, rest)


def _run(verb: str, rest: list[str]) -> int:
    module, script, _ = VERBS[verb]
    try:
        if verb != "run":  # what another tool says is its own
            without_noise()
        if verb in TAKEN_OUT:
            names, rest = taken_out(rest)
            import_parts(names)
        elif verb in FLAGS_ALONE:
            import_parts(named_imports(rest))
        run = import_module(f".{module}", __package__).run
        return run(rest) if script is None else run(verb, script, rest)
    except KeyboardInterrupt:
        return INTERRUPTED
    except MENDABLE as error:
        if wants_traceback():
            raise
        print(f"moe-peft {verb}: {one_line(error)}", file=sys.stderr)
        return 1


def _version() -> str:
    try:
        return f"peft-moe {version('peft-moe')}"
    except PackageNotFoundError:
        return "peft-moe, not installed"
