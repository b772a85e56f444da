"""How a script ends: quietly, with one line about what a user can mend, or with Ctrl-C's exit code."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from moe_peft.cli.errors import INTERRUPTED, MENDABLE, one_line, wants_traceback, without_noise

# Set on an error that came out of training itself, whose traceback is worth reading.
IN_TRAINING = "moe_peft_in_training"


def run(make_parser: Callable[[], Any], main: Callable[..., Any]) -> None:
    """Run a script from the command line.

    Args:
        make_parser: Of its flags.
        main: Takes what was parsed.

    Raises:
        SystemExit: With 1 after an error that was said in one line, and 130 after Ctrl-C.
    """
    without_noise()
    parser = None
    try:
        parser = make_parser()
        main(*parser.parse_args_and_config())
    except KeyboardInterrupt:
        interrupt_once()
        if os.environ.get("RANK", "0") == "0":
            print("Interrupted before training began; nothing was saved.", file=sys.stderr, flush=True)
        raise SystemExit(INTERRUPTED) from None
    except MENDABLE as error:
        if wants_traceback() or getattr(error, IN_TRAINING, False):
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"{getattr(parser, 'prog', 'moe-peft')}: {one_line(error)}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None


def interrupt_once() -> None:
    """Let no further Ctrl-C disturb how this process ends: a launcher passes on the one that the terminal has sent."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
