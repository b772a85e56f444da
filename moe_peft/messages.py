"""How messages show the values that they are about, and where warnings point."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from .types import MoePeftWarning

LIMIT = 200
PACKAGE = str(Path(__file__).parent)


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
    """Warn of something in a line of the user's, the nearest caller outside of this package.

    Args:
        message: What to say.
    """
    level, frame = 1, sys._getframe()
    while frame is not None and (frame.f_code.co_filename.startswith((PACKAGE, "<string>"))):
        frame, level = frame.f_back, level + 1  # type: ignore[assignment]
    warnings.warn(message, MoePeftWarning, stacklevel=level)
