"""What layers around a backbone's experts share whose adapters go with some of them: a selection for each adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from ..backbone.experts_call import ExpertsCall
from ..backbone.local_experts import local_experts
from ..backbone.split_rows import SplitRows
from ..config.parts import RoutedParts
from ..experts import Selection
from ..routers import backbone_routing
from .routed_layer import RoutedLayer


class SelectingLayer(RoutedLayer):
    """A layer whose adapters may go with some of the backbone's experts alone.

    Attributes:
        selections: Experts of the backbone by adapter name; adapters that go with all of them have none.
        splits: How adapters are split over processes, by name; those that every process holds whole have none.
    """

    other_param_names = (*RoutedLayer.other_param_names, "selections", "splits")
    selections: dict[str, Selection]
    splits: dict[str, SplitRows]

    def make_storage(self) -> None:
        """See `AdapterLayer.make_storage`."""
        super().make_storage()
        self.selections, self.splits = {}, {}

    def update_layer(self, adapter_name: str, parts: RoutedParts, *, inference_mode: bool = False) -> None:
        """Add an adapter; arguments as in `AdapterLayer.update_layer`."""
        if parts.selection is not None:
            self.selections[adapter_name] = parts.selection
        self._keep_tables()
        super().update_layer(adapter_name, parts, inference_mode=inference_mode)

    def share_out(self, adapter_name: str, parts: RoutedParts) -> None:
        """See `AdapterLayer.share_out`: an adapter without a router is split like the experts that it goes with."""
        local, bank = local_experts(self.get_base_layer()), cast(Any, parts.experts)
        if local is None or parts.router is not None or not bank.splits:
            return
        ids = None if parts.selection is None else parts.selection.ids
        rows = SplitRows(local, self.num_backbone_experts, ids)
        for name, own in list(bank.named_parameters()):
            split = rows.join(self.rows_here(bank, name, rows))
            # Past what meta devices put around the registration of parameters, as each process makes its own part.
            bank._parameters[name] = torch.nn.Parameter(split, requires_grad=own.requires_grad)
        bank.hold(rows.size)
        self.splits[adapter_name] = rows

    def rows_here(self, bank: torch.nn.Module, name: str, rows: SplitRows) -> torch.Tensor:
        """The rows of a whole tensor that this process holds; zeros where it has no values.

        Args:
            bank: Of an adapter.
            name: Of its parameter, (n, ...).
            rows: How it is split.
        """
        own = bank.get_parameter(name).detach()
        if own.is_meta:
            return torch.zeros(len(rows.own), *own.shape[1:], dtype=own.dtype, device=rows.local.mesh.device_type)
        return own[list(rows.own)]

    def split_of(self, adapter_name: str) -> SplitRows | None:
        """See `AdapterLayer.split_of`."""
        return self.splits.get(adapter_name)

    def delta_products(self, adapter_name: str) -> torch.Tensor | None:
        """See `AdapterLayer.delta_products`; None of an adapter of which a process holds a part."""
        return None if adapter_name in self.splits else super().delta_products(adapter_name)

    def _keep_tables(self) -> None:
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        for selection in self.selections.values():
            selection.keep_on(device)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> SelectingLayer:
        super()._apply(fn, recurse)
        self._keep_tables()  # the base layer may have moved
        return self

    def acting_names(self, adapter_names: list[str] | None) -> list[str]:
        """Adapters that act in a call; merged ones come out of the weights where adapters are disabled.

        Args:
            adapter_names: Adapter of each row, which such a layer cannot serve, as it does not know the rows.

        Raises:
            ValueError: Adapters are mixed in a batch.
        """
        if adapter_names is not None or self.tracker.mixes_rows():
            raise ValueError(
                f"Cannot pass `adapter_names` to {self.place}, which receives flattened tokens: adapters on a "
                "backbone's experts cannot be mixed in a batch. Activate one with model.set_adapter(name)."
            )
        if self.disable_adapters and self.merged:
            self.unmerge()
        return [] if self.disable_adapters else self.active_names()

    def show(self, names: list[str], call: ExpertsCall) -> None:
        """Tell the tracker what the backbone decided, where somebody looks.

        Args:
            names: Adapters that act on it.
            call: What the experts module was called with.
        """
        if not self.tracker.watched():
            return
        context = self.tracker.tokens(call.hidden, self.rows, self.training, self.place)
        for name in names:
            self.note(name, backbone_routing(call.index, call.weights, self.num_backbone_experts, context))
