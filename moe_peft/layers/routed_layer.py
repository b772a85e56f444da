"""Life of routed adapters on one wrapped module: storage by adapter name, activation, deletion, devices."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import quantization_extra_repr, resolve_quantization_backend
from torch import nn

from ..config.parts import RoutedParts, parts_merge
from ..experts import Experts, PendingRouting
from ..forward.tracker import ForwardTracker
from ..messages import shown, warn
from ..ops import cast_to_compute_dtype, project
from ..part import ModulePart
from ..quantization.four_bit import dtype_when_read
from ..routers import Router
from ..telemetry.stacked import as_sums
from ..telemetry.statistics import RoutingStatistics
from ..types import Place, Routing, TokenContext


class RoutedLayer(nn.Module, BaseTunerLayer):
    """Base of all layers that hold routed adapters.

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
        merges: Whether parts that do the same for every input can be merged at this kind of place.
        adds_to_output: Whether an adapter here adds to what the base layer gives, whatever that is.
    """

    merges: bool = False
    adds_to_output: bool = True
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
        self.objectives: dict[str, Any] = {}

    @property
    def experts(self) -> dict[str, Any]:
        """Expert banks by adapter name, a `ModuleDict`."""
        return cast(dict[str, Any], getattr(self, f"{self.prefix}experts"))

    @property
    def router(self) -> dict[str, Router]:
        """Routers by adapter name, a `ModuleDict`."""
        return cast(dict[str, Router], getattr(self, f"{self.prefix}router"))

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
        self.objectives[adapter_name] = parts.objective
        losses = getattr(parts.objective, "losses", {})
        for part in (parts.router, *losses.values()):
            if part is not None:
                self.tracker.need(part.context_needs)
        _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        # Eight bits hold a frozen weight with a scale of its own; a trained one would be rounded.
        if dtype is not None and dtype.is_floating_point and dtype.itemsize > 1:
            parts.experts.to(dtype)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters; arguments as in peft. Tensors that a part never trains stay frozen."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._refreeze()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Freeze adapters or let them train; arguments as in peft. Tensors that a part never trains stay frozen."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._refreeze()

    def requires_grad_(self, requires_grad: bool = True) -> RoutedLayer:
        """Freeze all parameters or let them train, but for the tensors that a part never trains."""
        super().requires_grad_(requires_grad)
        self._refreeze()
        return self

    def _refreeze(self) -> None:
        """Freeze the tensors that their parts never train; peft freezes and trains whole modules alone."""
        for part in (*self.experts.values(), *self.router.values()):
            for name in part.frozen if isinstance(part, ModulePart) else ():
                cast(nn.Module, part).get_parameter(name).requires_grad_(False)

    def note(self, adapter_name: str, routing: Routing) -> Routing:
        """Inject the router losses of a training pass, and tell the tracker what was decided.

        Args:
            adapter_name: Whose decision it is.
            routing: The decision.

        Returns:
            The same decision, whose weights must be used.
        """
        objective = self.objectives[adapter_name]
        if objective and routing.context.training:
            routing = objective(routing, self.tracker, self.place, adapter_name)
        self.tracker.record(self.place, adapter_name, routing)
        if self.block is not None:
            self.tracker.led[self.block, adapter_name] = routing
        if routing.context.training and self._counts(adapter_name):
            self.tracker.count(self.place, adapter_name, as_sums(RoutingStatistics.of(routing)))
        return routing

    def _counts(self, adapter_name: str) -> bool:
        """Whether a part changes after each optimizer step by what was decided."""
        losses = getattr(self.objectives[adapter_name], "losses", {})
        counts = adapter_name in self.router and self.router[adapter_name].counts
        return counts or any(loss.adapts for loss in losses.values())

    def add(
        self,
        adapter_name: str,
        x_TD: torch.Tensor,
        out_TO: torch.Tensor,
        context: TokenContext,
        *,
        routing: Routing | None = None,
        in_place: bool = False,
    ) -> torch.Tensor:
        """Let one adapter act: decide, note the decision, and bring its experts into the output.

        Args:
            adapter_name: Whose parts.
            x_TD: (T, D) input of the wrapped module.
            out_TO: (T, O) its output, with the adapters before this one.
            context: What is known about the tokens.
            routing: A decision that has been made and noted; None lets the adapter's router decide.
            in_place: Whether `out_TO` may be overwritten.

        Returns:
            (T, O) in the dtype of `out_TO`.
        """
        bank, read_TD = self.experts[adapter_name], cast_to_compute_dtype(x_TD)
        if routing is not None:
            return bank(read_TD, out_TO, routing, in_place=in_place)
        router = self.router[adapter_name]
        if router.reads == "block":
            return bank(read_TD, out_TO, router(self._led(adapter_name, x_TD), context), in_place=in_place)
        if router.reads == "activations":
            decide = partial(self.route, adapter_name, context=context)
            return bank(read_TD, out_TO, PendingRouting(context, decide), in_place=in_place)
        rows = _shared_rows(router, bank, read_TD, context)
        if rows is not None:
            out = project(read_TD, *rows)
            h_TR, logits_TE = out.split([rows[0].shape[0], rows[1].shape[0]], dim=-1)
            routing = self.note(adapter_name, router.decide(logits_TE, context))
            return bank.combine(h_TR, out_TO, routing, in_place=in_place)
        # A router reads the input as it comes: autocast's rounding would change which experts are selected.
        return bank(read_TD, out_TO, self.route(adapter_name, x_TD, context), in_place=in_place)

    def _led(self, adapter_name: str, x_TD: torch.Tensor) -> Routing:
        """The decision that the first place of the block has made about the same tokens.

        Raises:
            ValueError: There is none, as the model runs this place first.
        """
        led = None if self.block is None else self.tracker.led.get((self.block, adapter_name))
        if led is None or led.probs.shape[0] != x_TD.shape[0]:
            raise ValueError(
                f"{self.place} follows the decision of its block's first place, which has not decided about these "
                "tokens: the model runs them in another order. Leave one of them out of target_modules, or set "
                "router_scope='place'."
            )
        return led

    def route(self, adapter_name: str, x_TD: torch.Tensor, context: TokenContext) -> Routing:
        """Let an adapter's own router decide, and note the decision.

        Args:
            adapter_name: Whose router.
            x_TD: What it reads, (T, D) input or (T, E, r) activations.
            context: What is known about the tokens.
        """
        return self.note(adapter_name, self.router[adapter_name](x_TD, context))

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; where no other was active, the first that the model has left becomes so.

        peft lets each layer take the first of its own, which mixes adapters of different places.

        Args:
            adapter_name: Its name.
        """
        was_alone = self.active_adapters == [adapter_name]
        super().delete_adapter(adapter_name)
        self.tracker.adapters.pop(adapter_name, None)
        if was_alone:
            self.set_adapter(list(self.tracker.adapters)[:1])

    def active_names(self) -> list[str]:
        """Adapters that act in this forward: active, present here and not merged."""
        return [name for name in self.active_adapters if name in self.experts and name not in self.merged_adapters]

    def get_base_weight(self) -> torch.Tensor:
        """The weight of the base layer, dequantized where it is quantized."""
        if self.quantization_backend is not None:
            # Evaluation on some CPUs repacks 4-bit weights into a form that cannot be dequantized; saving undoes it.
            self.get_base_layer().state_dict()
        return super().get_base_weight()

    def check_rows(self, adapter_names: list[str], x: torch.Tensor, min_dim: int = 1) -> None:
        """Refuse adapter names that cannot be matched with the rows of an input.

        Args:
            adapter_names: Adapter of each row.
            x: (..., D) input of the layer.
            min_dim: Dimensions below which x holds flattened tokens, no rows.

        Raises:
            ValueError: There is not one name per row, or an adapter is merged into the base weight.
        """
        if self.rows == "media":
            raise ValueError(
                f"Cannot pass `adapter_names`: {self.place} reads images or sound, which do not tell the row of the "
                "batch they belong to. Leave the encoders out of an adapter whose rows are to be mixed; "
                "target_modules=None does."
            )
        if len(adapter_names) != x.shape[0] or x.dim() < min_dim:
            raise ValueError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got {len(adapter_names)} "
                f"and {tuple(x.shape[:-1])} respectively at {self.place}. Give one name per row of the batch; layers "
                "that receive flattened tokens cannot mix adapters in a batch."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def is_mergeable(self, adapter_name: str) -> bool:
        """Whether merging the adapter into the base weights is exact: asked of the kind of place and of the parts."""
        return self.merges and parts_merge(self.experts[adapter_name], self.router_of(adapter_name))

    def router_of(self, adapter_name: str) -> Router | None:
        """The router of an adapter; None where it follows the backbone's."""
        if adapter_name not in self.router:
            return None
        return self.router[adapter_name]

    def check_merge(self, adapter_names: Sequence[str], safe_merge: bool = False) -> None:
        """Refuse a merge for reasons beyond `is_mergeable`, without changing anything; there is none by default.

        Args:
            adapter_names: Adapters to merge.
            safe_merge: Whether to look for values that are not finite.

        Raises:
            ValueError: The adapters cannot be merged here.
        """

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the base weights; those that this layer does not hold are left out.

        Args:
            safe_merge: Whether to check the merged weights for values that are not finite before any is stored.
            adapter_names: Adapters to merge; None merges the active ones.

        Raises:
            ValueError: An adapter depends on its input, or merged weights are not finite; nothing has been changed.
        """
        asked = dict.fromkeys(check_adapters_to_merge(self, adapter_names))
        names = [name for name in asked if name in self.experts]
        for name in names:
            if not self.is_mergeable(name):
                raise ValueError(
                    f"Adapter {name!r} at {self.place} weighs its experts by the input, or stands beside more than a "
                    "weight; it cannot be merged."
                )
        self.check_merge(names, safe_merge)
        for name in names:
            self.merge_one(name)
            self.merged_adapters.append(name)

    def merge_one(self, adapter_name: str) -> None:
        """Change the base weights as an adapter does; a layer that `merges` says how."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it merges an adapter.")

    def unmerge(self) -> None:
        """Take all merged adapters out of the base weights."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.unmerge_to([])

    def unmerge_to(self, adapter_names: Sequence[str]) -> None:
        """Take merged adapters out of the base weights, the last one first, down to those that are named.

        Args:
            adapter_names: Adapters that were merged first, and stay so.
        """

    def extra_repr(self) -> str:
        """Say how the base layer is quantized."""
        return quantization_extra_repr(self)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """A routed sum depends on the token, so no single low-rank pair can replace it."""
        return False

    def scale_layer(self, scale: float) -> None:
        """Accept peft's call to rescale the active adapters; only a scale of one can be honoured."""
        if scale != 1:
            warn(f"Routed adapters cannot be rescaled; scale={shown(scale)} is ignored.")

    def unscale_layer(self, scale: float | None = None) -> None:
        """Accept peft's call to undo a rescaling; there is none to undo."""

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
        return device, dtype


def _shared_rows(
    router: Router, bank: Experts, x_TD: torch.Tensor, context: TokenContext
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Rows of experts and router that one GEMM on x may compute without calling either module.

    Both read the same input in this pass, in one dtype that holds float32 scores, and nothing of what a call does
    would be missed: hooks, weights that arrive when their module is called, a forward of somebody else's.
    """
    if x_TD.dtype.itemsize < 4 or not (is_plain(router) and is_plain(bank)):
        return None
    if bank.implementation(x_TD.shape[0], router.num_slots) not in (None, "dense"):
        return None
    weight, rows = router.shared_rows(context), bank.shared_rows(context)
    if weight is None or rows is None or not x_TD.dtype == weight.dtype == rows.dtype:
        return None
    return rows, weight


def is_plain(module: nn.Module) -> bool:
    """Whether calling a module runs its class's forward and nothing else, on weights that are there."""
    own, everywhere = vars(module), torch.nn.modules.module
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    common = (
        everywhere._global_forward_hooks,
        everywhere._global_forward_pre_hooks,
        everywhere._global_backward_hooks,
        everywhere._global_backward_pre_hooks,
    )
    return not (
        any(hooks)
        or any(common)
        or "forward" in own
        or own.get("_compiled_call_impl") is not None
        or any(p.is_meta for p in module._parameters.values() if p is not None)
    )
