"""How messages show the values that they are about, and where warnings point."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

import torch

from .types import MoePeftWarning

LIMIT = 200
# Packages through which a user's line reaches this one.
LIBRARIES = ("peft", "torch", "transformers", "trl", "accelerate", "contextlib", "dataclasses", "functools")


def shown(value: object, limit: int = LIMIT) -> str:
    """Text of a value for a message.

    Args:
        value: Anything, also what has no `repr`: integers of thousands of digits, lists nested beyond the recursion
            limit, objects whose own `repr` fails.
        limit: Number of characters.

    Returns:
        Its `repr` on one line, or a description where it has none; "..." ends what was cut.
    """
    if isinstance(value, int) and value.bit_length() > 4 * limit:
        return f"<an integer of {value.bit_length()} bits>"
    try:
        text = " ".join(repr(value[: limit + 1] if isinstance(value, (str, bytes)) else value).split())
    except Exception:
        # Values come from users and files; a message about one must not fail over it.
        return f"<a {type(value).__name__} that cannot be shown>"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def warn(message: str) -> None:
    """Warn of something in a line of the user's.

    It is the nearest caller outside of this package and of those that call it; where there is none, as in a thread of
    a library's own, the nearest outside of this package.

    Args:
        message: What to say.
    """
    if torch.compiler.is_compiling():  # frames cannot be looked at while they are traced
        warnings.warn(message, MoePeftWarning, stacklevel=1)
        return
    callers: list[str] = []
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        # Methods that `dataclass` writes have no file, but the module of their class.
        callers.append(str(frame.f_globals.get("__name__")).partition(".")[0])
        frame = frame.f_back
    outside = [level for level, name in enumerate(callers, start=1) if name != __package__]
    users = [level for level in outside if callers[level - 1] not in LIBRARIES]
    warnings.warn(message, MoePeftWarning, stacklevel=next(iter(users or outside), 1))
