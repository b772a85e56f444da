"""What layers around a linear layer share: whose adapters act in a call, one set for all rows or one for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from ..backbone.split_linear import WholeLinear, is_split
from .routed_layer import RoutedLayer


class LinearLayer(RoutedLayer):
    """Wraps a linear layer, plain or quantized; a kind of layer says how adapters act, alone and in mixed rows.

    Attributes:
        splits: Whether tensor parallelism gives each process a slice of the layer.
    """

    merges = True

    def make_storage(self) -> None:
        """See `AdapterLayer.make_storage`; tensor parallelism splits a model when it is loaded, before any adapter."""
        super().make_storage()
        self.splits = is_split(self.get_base_layer())

    def forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Apply the base layer and the adapters that act.

        Args:
            x: (..., D) input.
            *args: Passed to the base layer.
            adapter_names: Adapter of each row of the batch, "__base__" for none; None uses the active adapters.
            **kwargs: Passed to the base layer.

        Returns:
            (..., O) in the dtype the base layer returns.
        """
        if self._disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        mixes = adapter_names is not None or self.tracker.mixes_rows()
        names = [] if mixes else self.active_names()
        if not mixes and not names:
            return self.base_layer(x, *args, **kwargs)
        if names and not self.splits:
            return self.with_adapters(names, self._modules["base_layer"], x, *args, **kwargs)  # type: ignore[arg-type]
        adapted = partial(self._mixed, adapter_names) if mixes else partial(self.with_adapters, names)
        if not self.splits:
            return adapted(self.base_layer, x, *args, **kwargs)
        base = WholeLinear(self.base_layer, self.get_base_layer(), self.in_features, self.out_features)
        return base.own_part(adapted(base, base.whole_input(x), *args, **kwargs))

    def _mixed(
        self, row_names: list[str] | None, base: Callable[..., Any], x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Apply to each row its adapter, wherever the rows stand in x; None takes the names of this thread's call."""
        turned = self.tracker.positions_first(x, self.rows, self.place)
        rows_first = x.transpose(0, 1) if turned else x
        row_names = self.tracker.row_names(rows_first) if row_names is None else row_names
        assert row_names is not None
        self.check_rows(row_names, rows_first)
        out = self.with_adapters_of_rows(row_names, base, rows_first, *args, **kwargs)
        return out.transpose(0, 1) if turned else out

    def with_adapters(
        self, names: Sequence[str], base: Callable[..., Any], x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Apply the base layer and adapters to all rows; arguments as in `forward`.

        Args:
            names: The adapters, of which there is one at least.
            base: Computes the base layer.
            x: (..., D) input.
            *args: Passed to the base layer.
            **kwargs: Passed to the base layer.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how its adapters act.")

    def with_adapters_of_rows(
        self, adapter_names: list[str], base: Callable[..., Any], x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Apply the base layer, and to each row its adapter; arguments as in `forward`.

        Args:
            adapter_names: Adapter of each row of the batch, "__base__" for none.
            base: Computes the base layer.
            x: (B, ..., D) input.
            *args: Passed to the base layer.
            **kwargs: Passed to the base layer.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how its adapters act in mixed rows.")
