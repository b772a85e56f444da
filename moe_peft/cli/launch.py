"""`moe-peft sft` and its sisters: start a training script through accelerate, as `accelerate launch` does.

Flags of the launcher (`--num_processes`, `--config_file`, ...) go to it, all others to the script. One process takes
the place of this one, so that its exit code, its last line and Ctrl-C are the command's own.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from .errors import INTERRUPTED
from .shipped import find_config, shipped

# Flags of the launcher that say what to run, which the verb has said.
PROGRAM = "MOE_PEFT_PROGRAM"  # what a script calls itself in its help and messages
NOT_TAKEN = ("--module", "-m", "--no_python", "--help", "-h")


def run(verb: str, script: str, argv: list[str]) -> int:
    """Start a training script.

    Args:
        verb: What was typed, for messages.
        script: Name of the file in the folder of scripts, without its ending.
        argv: The words after the verb.

    Returns:
        Exit code of the script; does not return where one process takes this one's place.
    """
    path = shipped("train") / f"{script}.py"
    if {"-h", "--help"} & set(argv):
        return run_here(path, f"moe-peft {verb}", argv)
    from accelerate.commands.launch import _validate_launch_command, launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    launcher, own = split(argv, launch_command_parser())
    launcher = on_cpus(launcher, own)
    words = [*launcher, str(path), *own]
    # The launcher would list what it takes where nothing is said, for every run.
    logging.getLogger(launch_command.__module__).setLevel(logging.ERROR)
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    several = arguments.use_deepspeed or arguments.use_fsdp or arguments.use_megatron_lm
    if arguments.cpu or not (several or arguments.multi_gpu or arguments.tpu):
        command, environment = prepare_simple_launcher_cmd_env(arguments)
        return replace_process(command, {**environment, PROGRAM: f"moe-peft {verb}"})
    os.environ[PROGRAM] = f"moe-peft {verb}"
    # Each process has said what went wrong; the launcher would add a page about it.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(launch_command_parser().parse_args(words))
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        code = exit_code(error)
        if code != INTERRUPTED:
            said = f"a process ended with exit code {code}; its own message is above."
            print(f"moe-peft {verb}: {said}", file=sys.stderr)
        return code
    return 0


def split(argv: list[str], parser: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """Tell the launcher's flags from the script's; those that both have are the script's.

    Args:
        argv: The words after the verb.
        parser: accelerate's, which knows the launcher's flags.

    Returns:
        The launcher's words, with configurations by name replaced by their files, and the script's.

    Raises:
        ValueError: There is no such configuration.
    """
    shared = {f"--{own.name}" for own in dataclasses.fields(TrainingArguments)}
    actions = {
        option: action
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--") and option not in shared and option not in NOT_TAKEN
    }
    launcher, own, index = [], [], 0
    while index < len(argv):
        name, equals, value = argv[index].partition("=")
        action = actions.get(name)
        index += 1
        if action is None:
            own.append(argv[index - 1])
            continue
        values = [value] if equals else []
        if action.nargs != 0 and not equals and index < len(argv):
            values = [argv[index]]
            index += 1
        if name == "--config_file":
            values = [str(find_config(one, name, ("accelerate",))) for one in values]
        launcher += [name, *values]
    return launcher, own


def on_cpus(launcher: list[str], own: list[str]) -> list[str]:
    """The launcher's words, with the configuration that starts several processes without GPUs where they are wanted.

    accelerate starts a single one for `--num_processes 2` on a CPU, without a word.

    Args:
        launcher: Its words.
        own: Those of the script.
    """
    count = launcher[launcher.index("--num_processes") + 1] if "--num_processes" in launcher[:-1] else "1"
    on_cpu = any(
        word in ("--use_cpu=true", "--use_cpu=True") or (word == "--use_cpu" and following.lower() != "false")
        for word, following in zip(own, [*own[1:], ""], strict=False)
    )
    if not on_cpu or "--config_file" in launcher or not count.isdecimal() or int(count) < 2:
        return launcher
    return ["--config_file", str(find_config("two_cpu_processes", "--config_file", ("accelerate",))), *launcher]


def run_here(path: Path, program: str, argv: list[str]) -> int:
    """Run a script in this process, as `python PATH ...` would.

    Args:
        path: The script.
        program: Its name for its help.
        argv: Its words.

    Returns:
        Its exit code.
    """
    words, paths, named = sys.argv, list(sys.path), os.environ.get(PROGRAM)
    sys.argv, sys.path[:0] = [program, *argv], [str(path.parent)]
    os.environ[PROGRAM] = program
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv, sys.path[:] = words, paths
        os.environ.pop(PROGRAM) if named is None else os.environ.update({PROGRAM: named})
    return 0


def replace_process(command: list[str], environment: dict[str, str]) -> int:
    """Become another program; where the system cannot, start it and wait.

    Args:
        command: Its words, the first is its path.
        environment: Its environment.

    Returns:
        Its exit code, where it was waited for.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "posix":
        os.execve(command[0], command, environment)
    return subprocess.call(command, env=environment)


def exit_code(error: Any) -> int:
    """What the launcher's error means for the command: how its first failed process ended, or which signal came.

    Args:
        error: As torch's elastic launcher raises it: with `failures` of its processes, or the `sigval` that it got.

    Returns:
        As a shell counts: 128 and the number of a signal, 130 for Ctrl-C.
    """
    signal = getattr(error, "sigval", None)
    if signal is not None:
        return 128 + int(signal)
    failures = getattr(error, "failures", None) or {}
    codes = [failure.exitcode for failure in failures.values()]
    # A process that a signal ended has its negative number.
    return next((code for code in codes if code > 0), 128 - codes[0] if codes else 1)
