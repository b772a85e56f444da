"""What decides among the tokens of whole rows is refused where a backbone runs a module in slices of them."""

from __future__ import annotations

from ..types import TokenContext


def check_whole_rows(context: TokenContext, what: str, why: str, instead: str) -> None:
    """Refuse tokens that are a slice of their rows.

    Args:
        context: What is known about the tokens.
        what: Part or setting that needs whole rows.
        why: What it needs them for, in words that follow "and".
        instead: What else to set, in words that follow "or".

    Raises:
        ValueError: The tokens are a slice.
    """
    if context.part:
        raise ValueError(
            f"{what}: the backbone runs the module in slices of the rows, and {why}. Set chunk_size_feed_forward=0 in "
            f"the model's configuration (or switch tiling off), or {instead}."
        )
