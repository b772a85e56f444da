"""Experts as pairs of two choices: expert e = i E2 + j is the i-th of E1 first and the j-th of E2 second ones."""

from __future__ import annotations

import math


def divisor_below_root(number: int) -> int:
    """The largest divisor of a number up to its root, so that as few choices as can be make that many pairs.

    Args:
        number: E, from one.

    Returns:
        E1.
    """
    return max(n for n in range(1, math.isqrt(number) + 1) if number % n == 0)
