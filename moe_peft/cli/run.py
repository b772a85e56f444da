"""`moe-peft run`: run a module or a script of any tool with the adapter types registered.

A tool that loads adapters with stock peft stops at ours with a `KeyError` of the type's name, as peft looks for no
packages that bring types along. Here the types are registered before the tool starts; it need not know of us.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
import traceback
from importlib.util import find_spec
from pathlib import Path

import moe_peft


def run(argv: list[str]) -> int:
    """Run it in this process.

    Args:
        argv: The words after the verb: `-m MODULE ...`, or `SCRIPT ...`.

    Returns:
        Its exit code.

    Raises:
        ValueError: There is no such script.
    """
    parser = argparse.ArgumentParser(
        prog="moe-peft run",
        usage="moe-peft run (-m MODULE | SCRIPT) [its arguments]",
        description="Import moe_peft, which registers the adapter types with peft, then run a module or a script as "
        "python itself would: moe-peft run -m lm_eval --model hf --model_args pretrained=BASE,peft=ADAPTER "
        "--tasks arc_easy",
        add_help=False,
    )
    if not argv or argv[0] in ("-h", "--help"):
        parser.print_help()
        return 0 if argv else 2
    assert moe_peft.__version__  # the import is what counts
    if argv[0] == "-m":
        if len(argv) < 2:
            parser.error("-m needs the name of a module")
        return _execute(_known(argv[1]), argv[1:], os.getcwd(), is_module=True)
    script = Path(argv[0])
    if not script.exists():
        raise ValueError(f"{argv[0]}: there is no such script. For an installed tool write -m and its module's name.")
    return _execute(str(script), argv, str(script.resolve().parent), is_module=False)


def _known(module: str) -> str:
    """A module's name, of one that can be found."""
    sys.path.insert(0, os.getcwd())
    try:
        found = find_spec(module)
    except ModuleNotFoundError:
        found = None
    finally:
        sys.path.pop(0)
    if found is None:
        raise ValueError(f"-m {module}: there is no module of that name. Is the tool installed in this environment?")
    return module


def _execute(target: str, words: list[str], folder: str, *, is_module: bool) -> int:
    """Run with the arguments and the first entry of the path that python would give."""
    before, paths = sys.argv, list(sys.path)
    sys.argv, sys.path[:0] = list(words), [folder]
    try:
        if is_module:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(target, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        # The tool's own error, which is for the tool's user to see in full.
        traceback.print_exc()
        return 1
    finally:
        sys.argv, sys.path[:] = before, paths
    return 0
