"""Errors as a person at a terminal reads them: one line, without a traceback."""

from __future__ import annotations

import os
import warnings

# What a user can mend: values, files, the network, and packages that are not installed.
MENDABLE = (ValueError, OSError, ImportError)
INTERRUPTED = 130
LONGEST = 2000
# What peft and TRL call by its earlier name, which no user has written or can mend.
NOISE = "`is_gradient_checkpointing` is deprecated"


def wants_traceback() -> bool:
    """Whether the environment asks to see where an error comes from."""
    return os.environ.get("MOE_PEFT_TRACEBACK", "") not in ("", "0")


def without_noise() -> None:
    """Leave out warnings of other packages about themselves, for the rest of this process."""
    warnings.filterwarnings("ignore", NOISE, FutureWarning)


def not_found(flag: str, name: str, error: BaseException) -> str:
    """What to say of a model whose configuration cannot be had, as the libraries do not always name it.

    Args:
        flag: What it was given to.
        name: Of the model.
        error: What came of it.
    """
    return f"{flag} {name} is no folder here, and cannot be fetched from the Hub ({one_line(error)})"


def one_line(error: BaseException) -> str:
    """The message of an error in one line.

    Args:
        error: Any.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
