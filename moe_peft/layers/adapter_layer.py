"""Life of routed adapters on one wrapped module: storage by adapter name, activation, deletion, devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import quantization_extra_repr, resolve_quantization_backend
from torch import nn

from ..backbone.offloaded import execution_device
from ..backbone.split_rows import SplitRows
from ..config.parts import RoutedParts
from ..forward.frozen import freeze
from ..forward.objective import RouterObjective
from ..forward.tracker import ForwardTracker
from ..part import ModulePart, Part
from ..place import Place
from ..quantization.four_bit import dtype_when_read
from ..routers import Router


class AdapterLayer(nn.Module, BaseTunerLayer):
    """Holds routed adapters beside one wrapped module.

    Parameters live at `<prefix>experts.<adapter>.<param>` and `<prefix>router.<adapter>.<param>`: a dictionary of flat
    modules by adapter name, which is the only form that saving, loading under another name, and the reference copy of
    TRL's trainers all handle.

    Args:
        base_layer: The wrapped module.
        adapter_name: Name of the first adapter.
        parts: Its router, experts and losses.
        prefix: Prefix of the adapter type.
        place: What the wrapped module is, and its name.
        tracker: The model's forward tracker.
        quantization: What the quantization backend needs to know of the model.
        inference_mode: Whether the adapter's parameters stay frozen.

    Attributes:
        adds_to_output: Whether an adapter here adds to what the base layer gives, whatever that is.
    """

    adds_to_output: bool = True
    # For DeepSpeed's ZeRO-3: gather all parameters for the whole call, as it cannot follow the decisions that pass
    # between the modules in here.
    _z3_leaf = True
    other_param_names: tuple[str, ...] = ("objectives",)

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        *,
        parts: RoutedParts,
        prefix: str,
        place: Place,
        tracker: ForwardTracker,
        quantization: dict[str, Any],
        inference_mode: bool = False,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.prefix = prefix
        self.place = place.name
        self.in_features, self.out_features = place.in_features, place.out_features
        self.num_backbone_experts = place.num_experts or 0
        self.rows = place.rows
        self.block = place.block
        self.tracker = tracker
        self.adapter_layer_names = (f"{prefix}experts", f"{prefix}router")
        self.make_storage()
        self.frozen_peft_weight_names = {}
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **quantization)
        self._disable_adapters = False
        self.merged_adapters = []
        self.cast_input_dtype_enabled = True
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, parts, inference_mode=inference_mode)

    def make_storage(self) -> None:
        """Make the dictionaries by adapter name; a kind of layer adds those of its own."""
        setattr(self, f"{self.prefix}experts", nn.ModuleDict())
        setattr(self, f"{self.prefix}router", nn.ModuleDict())
        self.objectives: dict[str, RouterObjective] = {}

    @property
    def experts(self) -> dict[str, Any]:
        """Expert banks by adapter name, a `ModuleDict`."""
        return cast(dict[str, Any], self._modules[self.adapter_layer_names[0]])

    @property
    def router(self) -> dict[str, Router]:
        """Routers by adapter name, a `ModuleDict`."""
        return cast(dict[str, Router], self._modules[self.adapter_layer_names[1]])

    def update_layer(self, adapter_name: str, parts: RoutedParts, *, inference_mode: bool = False) -> None:
        """Add an adapter.

        Args:
            adapter_name: Its name.
            parts: Its router, experts and losses.
            inference_mode: Whether its parameters stay frozen.
        """
        self.experts[adapter_name] = parts.experts
        self.tracker.adapters.setdefault(adapter_name)
        if parts.router is not None:
            self.router[adapter_name] = parts.router
        self.objectives[adapter_name] = objective = parts.objective or RouterObjective({})
        for part in (parts.experts, parts.router, *objective.losses.values()):
            if isinstance(part, Part):
                self.tracker.need(part.context_needs)
        _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        # Eight bits hold a frozen weight with a scale of its own; a trained one would be rounded.
        if dtype is not None and dtype.is_floating_point and dtype.itemsize > 1:
            parts.experts.to(dtype)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.share_out(adapter_name, parts)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def share_out(self, adapter_name: str, parts: RoutedParts) -> None:
        """Leave this process a part of an adapter, at places whose experts are shared out over processes.

        Args:
            adapter_name: Its name.
            parts: Its parts, whole, which the layer holds.
        """

    def split_of(self, adapter_name: str) -> SplitRows | None:
        """How an adapter is split over processes; None where each holds the whole.

        Args:
            adapter_name: Its name.
        """
        return None

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters; arguments as in peft. Tensors that a part never trains stay frozen."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.tracker.shared.settled = False
        self.tracker.frozen.forget()
        self._refreeze()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Freeze adapters or let them train; arguments as in peft. Tensors that a part never trains stay frozen."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._refreeze()

    def requires_grad_(self, requires_grad: bool = True) -> AdapterLayer:
        """Freeze all parameters or let them train, but for the tensors that a part never trains."""
        super().requires_grad_(requires_grad)
        self._refreeze()
        return self

    def _refreeze(self) -> None:
        """Freeze the tensors that their parts never train; peft freezes and trains whole modules alone."""
        for part in (*self.experts.values(), *self.router.values()):
            if isinstance(part, ModulePart):
                freeze(cast(nn.Module, part), part.frozen)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; where no other was active, the first that the model has left becomes so.

        peft lets each layer take the first of its own, which mixes adapters of different places.

        Args:
            adapter_name: Its name.
        """
        was_alone = self.active_adapters == [adapter_name]
        super().delete_adapter(adapter_name)
        self.tracker.frozen.forget()
        self.tracker.adapters.pop(adapter_name, None)
        if was_alone:
            self.set_adapter(list(self.tracker.adapters)[:1])

    def active_names(self) -> list[str]:
        """Adapters that act in this forward: active, present here and not merged."""
        held: Any = self._modules[self.adapter_layer_names[0]]
        active, merged = self._active_adapter, self.merged_adapters
        if isinstance(active, str):
            return [active] if active in held._modules and active not in merged else []
        return [name for name in active if name in held._modules and name not in merged]

    def parts_of(self, adapter_name: str) -> tuple[Router | None, Any]:
        """The router of an adapter, None where it follows the backbone's, and its experts.

        Args:
            adapter_name: Of an adapter that is present here.
        """
        of_experts, of_routers = self.adapter_layer_names
        experts: Any = self._modules[of_experts]
        routers: Any = self._modules[of_routers]
        # Past the calls of a `ModuleDict`, as this is asked in every forward of every place.
        return routers._modules.get(adapter_name), experts._modules[adapter_name]

    def delta_products(self, adapter_name: str) -> torch.Tensor | None:
        """Inner products of what an adapter's experts add here; see `Experts.delta_products`.

        Args:
            adapter_name: Its name.
        """
        return self.experts[adapter_name].delta_products()

    def router_of(self, adapter_name: str) -> Router | None:
        """The router of an adapter; None where it follows the backbone's."""
        if adapter_name not in self.router:
            return None
        return self.router[adapter_name]

    def extra_repr(self) -> str:
        """Say how the base layer is quantized."""
        return quantization_extra_repr(self)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter, keeping its precision: after loading, a cast to 16 bits would round it."""
        if device is None:
            device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        modules = [bank[adapter_name] for bank in (self.experts, self.router) if adapter_name in bank]
        for module in modules:
            if device is not None and not any(p.is_meta for p in module.parameters()):
                module.to(device)

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        if device is None:
            parameter = next(base_layer.parameters(), None)
            if parameter is not None:
                device, dtype = parameter.device, dtype_when_read(base_layer) or parameter.dtype
        if device is not None and device.type == "meta":
            # Of offloaded weights; adapters are small, and stay where the layer computes.
            device = execution_device(base_layer) or device
        return device, dtype
