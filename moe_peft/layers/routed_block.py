"""A whole block with routed adapters beside it: y = block(x) + the routed sum of every active adapter.

The block may be a mixture of experts with its own router, a plain MLP, or any module that maps hidden states to hidden
states of the same shape, alone or first in a tuple (PERFT, arXiv 2508.02587).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..config.parts import RoutedParts
from ..types import Routing, TokenContext
from .routed_layer import RoutedLayer


class RoutedBlock(RoutedLayer):
    """Wraps a module whose first floating tensor argument is its input."""

    def update_layer(self, adapter_name: str, parts: RoutedParts, *, inference_mode: bool = False) -> None:
        """Add an adapter; arguments as in `AdapterLayer.update_layer`."""
        self.jitters = _jitters(self.base_layer)
        super().update_layer(adapter_name, parts, inference_mode=inference_mode)

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """Apply the block and the active adapters.

        Args:
            *args: Passed to the block; the first floating tensor is x, (..., D).
            adapter_names: Adapter of each row of the batch, "__base__" for none; None uses the active adapters.
            **kwargs: Passed to the block; looked at for x where no positional argument is a tensor.

        Returns:
            What the block returns; its output, (..., D), or the first entry of a tuple, has the adapters added.
        """
        names, adapter_names = self.acting(adapter_names, args, kwargs)
        if not names:
            return self.base_layer(*args, **kwargs)
        x = first_floating(args, kwargs)
        if x.dim() == 1:  # the hidden states of chosen tokens, one after the other
            x = x.reshape(-1, self.in_features)
        own_x = x.clone() if self.jitters and self.training else x
        result = self.base_layer(*args, **kwargs)
        out = result[0] if isinstance(result, tuple) else result
        if adapter_names is None:
            context = self.tracker.tokens(own_x, self.rows, self.training, self.place)
            for name in names:
                out = self._add_adapter(name, own_x, out, context, args, kwargs)
        else:
            # Some blocks return flattened tokens.
            mixed = out.reshape(*x.shape[:-1], self.out_features).clone()
            of_rows, own_x = self.rows_first(mixed), self.rows_first(own_x)
            context = self.tracker.tokens(own_x, self.rows, self.training, self.place, turned=False)
            for name in names:
                rows = [row for row, own in enumerate(adapter_names) if own == name]
                of_rows[rows] = self._add_adapter(name, own_x[rows], of_rows[rows], context.rows(rows), args, kwargs)
            out = mixed.reshape(out.shape)
        return (out, *result[1:]) if isinstance(result, tuple) else out

    def acting(
        self, adapter_names: list[str] | None, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[list[str], list[str] | None]:
        """The adapters that act in a call.

        Args:
            adapter_names: Adapter of each row of the batch, "__base__" for none; None uses the active adapters.
            args: The block's positional arguments.
            kwargs: The same by name.

        Returns:
            Their names, and the adapter of each row; None in its place where all act on all rows.

        Raises:
            ValueError: The rows of the input cannot be matched with the names.
        """
        mixed = adapter_names is not None or self.tracker.mixes_rows()
        if self.disable_adapters or not (mixed or self.active_names()):
            return [], None
        x = first_floating(args, kwargs)
        x = self.rows_first(x) if mixed else x
        if adapter_names is None:
            adapter_names = self.tracker.row_names(x)
        if adapter_names is None:
            return self.active_names(), None
        names = sorted(set(adapter_names) & set(self.experts))
        if names:
            self.check_rows(adapter_names, x, min_dim=3)
        return names, adapter_names

    def rows_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """A view of hidden states whose first axis counts the rows of the batch.

        Args:
            tensor: (..., D), or the same with positions first.
        """
        turned = self.tracker.positions_first(tensor, self.rows, self.place)
        return tensor.transpose(0, 1) if turned else tensor

    def _add_adapter(
        self,
        name: str,
        x: torch.Tensor,
        out: torch.Tensor,
        context: TokenContext,
        args: tuple,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        routing = self._decided(name, context, args, kwargs)
        x_TD, out_TO = x.reshape(-1, x.shape[-1]), out.reshape(-1, self.out_features)
        return self.add(name, x_TD, out_TO, context, routing=routing).reshape(out.shape)

    def _decided(self, name: str, context: TokenContext, args: tuple, kwargs: dict[str, Any]) -> Routing | None:
        """The decision that the block's arguments bring along; None where the adapter's router decides."""
        return None


def _jitters(block: nn.Module) -> bool:
    """Whether a block, or its router, multiplies its input by noise in place in training, before we read it."""
    settings = [(name, value) for module in block.modules() for name, value in vars(module).items()]
    return any("jitter" in name and isinstance(value, float) and value > 0 for name, value in settings)


def first_floating(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """The first floating tensor among the arguments of a call, which is a block's input.

    Args:
        args: Positional arguments.
        kwargs: The same by name.

    Raises:
        TypeError: There is none.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value
    raise TypeError("A block with routed adapters was called without a floating tensor; its input cannot be found.")
