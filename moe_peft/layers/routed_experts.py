"""The backbone's own experts with low-rank experts beside them, one for each, under the same routing (PERFT-E).

    y = sum_k w_k (FFN_{i_k}(x) + a_{i_k}(x)) = experts(x, i, w) + low_rank(x, i, w)

The experts module's inputs are the routing, so this is exact for every implementation of the experts, quantized or
not. Where processes share the experts and an adapter is split like them, each process adds its own part, to the rows
that it is sent.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..backbone.experts_call import experts_call
from ..backbone.local_experts import Compute, local_experts
from ..backbone.split_rows import read_here
from ..routers import backbone_routing
from ..types import Routing, TokenContext
from .routed_block import RoutedBlock
from .selecting_layer import SelectingLayer


class RoutedExperts(SelectingLayer, RoutedBlock):
    """Wraps an experts module; an adapter without a router of its own follows the backbone's."""

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """Apply the experts and the active adapters; arguments as in `RoutedBlock.forward`.

        Raises:
            ValueError: Adapters are mixed in a batch, and one of them is split over processes.
        """
        local = local_experts(self.get_base_layer()) if self.splits else None
        names = [name for name in self.acting_names(adapter_names) if name in self.splits] if local else []
        if local is None or not names:
            return super().forward(*args, adapter_names=adapter_names, **kwargs)
        call = experts_call(args, kwargs)
        training = self.tracker.tokens(call.hidden, self.rows, self.training).training
        with local.changed(partial(self._add_here, names, training)):
            return super().forward(*args, **kwargs)

    def _add_here(
        self,
        names: list[str],
        training: bool,
        own: Compute,
        hidden_ND: torch.Tensor,
        index_NK: torch.Tensor,
        weights_NK: torch.Tensor,
    ) -> torch.Tensor:
        """Compute the experts that are here, with the parts of split adapters beside them."""
        out_NO = own(hidden_ND, index_NK, weights_NK)
        context = TokenContext(training=training)
        for name in names:
            rows = self.splits[name]
            routing = backbone_routing(rows.rows_of(index_NK), weights_NK, rows.size, context)
            with read_here(self.experts[name], rows):
                out_NO = self.add(name, hidden_ND, out_NO, context, routing=routing)
        return out_NO

    def _add_adapter(
        self,
        name: str,
        x: torch.Tensor,
        out: torch.Tensor,
        context: TokenContext,
        args: tuple,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        if name in self.splits:
            self._decided(name, context, args, kwargs)  # the adapter itself has acted inside of the call
            return out
        return super()._add_adapter(name, x, out, context, args, kwargs)

    def _decided(self, name: str, context: TokenContext, args: tuple, kwargs: dict[str, Any]) -> Routing | None:
        if name in self.router:
            return None
        call = experts_call(args, kwargs)
        index_TK, num_experts = call.index, self.num_backbone_experts
        if name in self.selections:
            index_TK, num_experts = self.selections[name].local(index_TK), len(self.selections[name])
        return self.note(name, backbone_routing(index_TK, call.weights, num_experts, context))
