"""A gated FFN whose experts are copies of it with low-rank pairs: they act between its matrices, not beside it.

The frozen projections run once, whatever the number of adapters and experts; the FFN itself is called, so that its
hooks fire, and runs its equation with what the adapters change (MixLoRA, arXiv 2404.15159).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from ..backbone.gated_ffn import GatedFfn, gated_ffn
from ..config.parts import RoutedParts
from ..types import TokenContext
from .expert_pass import call_with
from .routed_block import RoutedBlock, first_floating

Changes = tuple[torch.Tensor, torch.Tensor]


class RoutedFfn(RoutedBlock):
    """Wraps a gated FFN.

    Attributes:
        ffn: The parts of the FFN.
    """

    adds_to_output = False
    ffn: GatedFfn

    def update_layer(self, adapter_name: str, parts: RoutedParts, *, inference_mode: bool = False) -> None:
        """Add an adapter; arguments as in `AdapterLayer.update_layer`."""
        found = gated_ffn(self.get_base_layer())
        assert found is not None
        self.ffn = found
        super().update_layer(adapter_name, parts, inference_mode=inference_mode)

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """Apply the FFN with the active adapters; arguments as in `RoutedBlock.forward`.

        Returns:
            (..., O), the FFN's output.
        """
        names, adapter_names = self.acting(adapter_names, args, kwargs)
        if not names:
            return self.base_layer(*args, **kwargs)
        base = self.get_base_layer()
        compute = partial(self._compute, base, names, adapter_names)
        return call_with(compute, self, self.base_layer, base, *args, **kwargs)

    def _compute(
        self, base: nn.Module, names: list[str], adapter_names: list[str] | None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """The FFN's equation, with what each adapter changes in its rows."""
        given = first_floating(args, kwargs)
        x = given if adapter_names is None else self.rows_first(given)
        u, t = self.ffn.read(base, x)
        v = self.ffn.activate(base, u) * t
        turned = None if adapter_names is None else False
        context = self.tracker.tokens(x, self.rows, self.training, self.place, turned=turned)
        changed, additions = v, []
        for name in names:
            rows = None if adapter_names is None else [row for row, own in enumerate(adapter_names) if own == name]
            states = [state if rows is None else state[rows] for state in (x, u, t, v)]
            known = context if rows is None else context.rows(rows)
            change_TF, added_TO = self._experts(name, base, states, known)
            changed = _plus(changed, change_TF, rows)
            additions.append((added_TO, rows))
        out = self.ffn.write(base, changed)
        for added_TO, rows in additions:
            out = _plus(out, added_TO, rows)
        return out if x is given else out.transpose(0, 1)

    def _experts(
        self, name: str, base: nn.Module, states: Sequence[torch.Tensor], context: TokenContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What one adapter's experts change between the matrices, and what they add to the output."""
        x_TD, *inner = (state.reshape(-1, state.shape[-1]) for state in states)
        routing = self.route(name, x_TD, context)
        bank = self.experts[name]
        return cast(Changes, bank(x_TD, *inner, routing, act=partial(self.ffn.activate, base)))


def _plus(total: torch.Tensor, part_TO: torch.Tensor, rows: list[int] | None) -> torch.Tensor:
    """Add what the tokens of some rows get; of all of them where no rows are named."""
    own = total if rows is None else total[rows]
    own = own + part_TO.to(total.dtype).view(own.shape)
    if rows is None:
        return own
    result = total.clone()
    result[rows] = own
    return result
