"""Ranges of sizes and factors beyond which a value is a slip of the pen, or leaves the range of float32."""

from __future__ import annotations

# Sizes beyond these are slips of the pen.
MAX_RANK, MAX_EXPERTS = 2**16, 2**20
# Factors outside of these leave the range of float32, if not at once then in an optimizer's squares.
SMALLEST, LARGEST = 1e-30, 1e6
IN_RANGE = f"from {SMALLEST:g} to {LARGEST:g}"


def is_coefficient(value: float) -> bool:
    """Whether a number can be the weight of a loss: zero, or one that float32 keeps through a training step."""
    return value == 0 or SMALLEST <= value <= LARGEST
