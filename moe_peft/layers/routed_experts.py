"""The backbone's own experts with low-rank experts beside them, one for each, under the same routing (PERFT-E).

    y = sum_k w_k (FFN_{i_k}(x) + a_{i_k}(x)) = experts(x, i, w) + low_rank(x, i, w)

The experts module's inputs are the routing, so this is exact for every implementation of the experts, quantized or
not.
"""

from __future__ import annotations

from typing import Any

from ..backbone.experts_call import experts_call
from ..routers import backbone_routing
from ..types import Routing, TokenContext
from .routed_block import RoutedBlock
from .selecting_layer import SelectingLayer


class RoutedExperts(SelectingLayer, RoutedBlock):
    """Wraps an experts module; an adapter without a router of its own follows the backbone's."""

    def _decided(self, name: str, context: TokenContext, args: tuple, kwargs: dict[str, Any]) -> Routing | None:
        if name in self.router:
            return None
        call = experts_call(args, kwargs)
        index_TK, num_experts = call.index, self.num_backbone_experts
        if name in self.selections:
            index_TK, num_experts = self.selections[name].local(index_TK), len(self.selections[name])
        return self.note(name, backbone_routing(index_TK, call.weights, num_experts, context))
