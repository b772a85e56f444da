"""Random scores that stay as they are: z = W x with a W that never trains (SMoE-Dropout, arXiv 2303.01610).

Experts learn to share the work that a random router deals out, so that more of them may be used later than in
training.
"""

from __future__ import annotations

from .linear import LinearRouter


class FixedRandomRouter(LinearRouter):
    """Scores the experts by a frozen random matrix, saved with the adapter; arguments as in `LinearRouter`."""

    learns = False
    frozen = ("weight",)
