"""Errors as a person at a terminal reads them: one line, without a traceback."""

from __future__ import annotations

import os

# What a user can mend: values, files, the network, and packages that are not installed.
MENDABLE = (ValueError, OSError, ImportError)
INTERRUPTED = 130
LONGEST = 2000


def wants_traceback() -> bool:
    """Whether the environment asks to see where an error comes from."""
    return os.environ.get("MOE_PEFT_TRACEBACK", "") not in ("", "0")


def one_line(error: BaseException) -> str:
    """The message of an error in one line.

    Args:
        error: Any.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
