"""No decision of one's own: a place follows the first router of its block.

In a block whose places share one decision, the first place decides and the later ones hold this router.
"""

from __future__ import annotations

from typing import Any

from ..types import Routing, TokenContext
from .router import Router


class FollowingRouter(Router):
    """A router without parameters that is given the block's decision as x; arguments as in `Router`."""

    reads = "block"

    def forward(self, x: Any, context: TokenContext) -> Routing:
        """Return the decision that the block's first place has made.

        Args:
            x: That decision.
            context: Not used; the decision holds what is known about the tokens.
        """
        return x
