"""Run the processes of one group, and say what each of them did when one fails or hangs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

# For the stacks that a process writes once it is told to stop.
GRACE_SECONDS = 5


def run_together(commands: Sequence[Sequence[str]], timeout: float = 300) -> None:
    """Run all commands at once, one thread each, until all have ended.

    Args:
        commands: One command for each process of the group.
        timeout: In seconds, for the whole group.

    Raises:
        AssertionError: A process failed, which ends the others too, or did not end in time. The message has the end
            of what each printed; a process that was still running has printed where each of its threads stood.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), "PYTHONFAULTHANDLER": "1"}
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in commands]
        processes = [
            stack.enter_context(_killed(list(command), env=environment, stdout=output, stderr=subprocess.STDOUT))
            for command, output in zip(commands, outputs, strict=True)
        ]
        end = time.monotonic() + timeout
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            if any(process.poll() for process in processes):
                break
            time.sleep(0.1)
        if any(process.poll() != 0 for process in processes):
            raise AssertionError("\n".join(map(_report, processes, outputs)))


@contextlib.contextmanager
def _killed(command: Sequence[str], **arguments: Any) -> Iterator[subprocess.Popen]:
    """A process that does not outlive the block."""
    process = subprocess.Popen(command, **arguments)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _report(process: subprocess.Popen, output: TextIO) -> str:
    """How a process ended, and the last that it printed; one that still runs is stopped."""
    code = process.poll()
    if code is None:
        process.send_signal(signal.SIGABRT)
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
    output.seek(0)
    ended = "was still running" if code is None else f"ended with {code}"
    return f"{' '.join(map(str, process.args))} {ended}:\n{output.read()[-3000:]}"
