"""What layers around a linear layer share: whose adapters act in a call, one set for all rows or one for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .routed_layer import RoutedLayer


class LinearLayer(RoutedLayer):
    """Wraps a linear layer, plain or quantized; a kind of layer says how adapters act, alone and in mixed rows."""

    merges = True

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
        if adapter_names is not None or self.tracker.mixes_rows():
            turned = self.tracker.positions_first(x, self.rows, self.place)
            rows_first = x.transpose(0, 1) if turned else x
            names = self.tracker.row_names(rows_first) if adapter_names is None else adapter_names
            assert names is not None
            self.check_rows(names, rows_first)
            out = self.with_adapters_of_rows(names, rows_first, *args, **kwargs)
            return out.transpose(0, 1) if turned else out
        names = self.active_names()
        if not names:
            return self.base_layer(x, *args, **kwargs)
        return self.with_adapters(names, x, *args, **kwargs)

    def with_adapters(self, names: Sequence[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Apply the base layer and adapters to all rows; arguments as in `forward`.

        Args:
            names: The adapters, of which there is one at least.
            x: (..., D) input.
            *args: Passed to the base layer.
            **kwargs: Passed to the base layer.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how its adapters act.")

    def with_adapters_of_rows(
        self, adapter_names: list[str], x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Apply the base layer, and to each row its adapter; arguments as in `forward`.

        Args:
            adapter_names: Adapter of each row of the batch, "__base__" for none.
            x: (B, ..., D) input.
            *args: Passed to the base layer.
            **kwargs: Passed to the base layer.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how its adapters act in mixed rows.")
