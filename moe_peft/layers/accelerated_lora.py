"""Stock peft's LoRA on fused experts, computed in activation space instead of by adding it to the experts' weights.

peft reaches 3-D parameters with `LoraConfig(target_parameters=...)`: a wrapper for each parameter, nested around the
module that owns them, registers W + s B A for all experts in every forward. Here the same wrappers leave the weights
alone, and the module runs the pass of `ops.expert_lora` on the wrappers' own tensors.

Where stock tensors lie (A (E, r, I), B (E, r, O); the widths are those of y = x W):
    lora_A.weight (E * r, I)    row    e * r + j  is A[e, j]       expert by expert
    lora_B.weight (O, r * E)    column j * E + e  is B[e, j]       rank by rank
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..backbone.experts_call import experts_call
from ..messages import warn
from ..ops.expert_lora import expert_lora
from ..ops.expert_stacks import LowRankPairs
from .expert_pass import call_with, is_watched, owner_of_pass, replaced_forward
from .fused_experts import DOWN, matrix_names, read_fused, stored_shape, why_not_fused


class AcceleratedParamWrapper(ParamWrapper):
    """A `ParamWrapper` whose nest computes in activation space; tensors, files and every other method are stock."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the wrapped experts with the active adapters; arguments as in peft."""
        nest, experts = _nest(self), self.get_base_layer()
        mixed = kwargs.get("adapter_names") is not None
        if mixed or nest[-1].base_layer is not experts or any(own.disable_adapters or own.merged for own in nest):
            return super().forward(x, *args, **kwargs)
        if torch.compiler.is_compiling() and any(is_watched(module) for module in (*nest, experts)):
            return self._call_outside_of_the_graph(x, *args, **kwargs)
        if not torch.compiler.is_compiling() and (self._is_inside(experts) or any(map(_does_more, nest[1:]))):
            return super().forward(x, *args, **kwargs)
        # The outermost wrapper is called first, and nobody asks whether those inside it are.
        out: torch.Tensor = call_with(partial(_run, experts, nest), self, experts, experts, x, *args, **kwargs)
        return out

    def _is_inside(self, experts: nn.Module) -> bool:
        """Whether a wrapper around this one has set the pass of this call, which holds this one's pairs too."""
        owner = owner_of_pass(experts)
        return owner is not None and owner is not self and self in _nest(owner)

    @torch.compiler.disable
    def _call_outside_of_the_graph(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().forward(*args, **kwargs)

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        experts = self.get_base_layer()
        if self._is_inside(experts):
            yield
            return
        with replaced_forward(experts, self, partial(_run, experts, _nest(self))):
            yield


# peft finds the wrapper of a parameter, for a further adapter on it, by the name of its class.
AcceleratedParamWrapper.__name__ = ParamWrapper.__name__


def accelerate_expert_lora(model: nn.Module, enabled: bool = True) -> nn.Module:
    """Compute stock peft's LoRA on a model's fused experts in activation space.

    The adapters stay stock: the same tensors, files, names and calls, and the same numbers to rounding, in training
    and in generation. Call it once, when the adapters are on the model; adapters added or loaded later are included.

    Args:
        model: A model with LoRA adapters of `LoraConfig(target_parameters=...)`: a `PeftModel`, or a model of
            transformers that was given adapters. `moe_peft.expert_parameters(model)` names the parameters.
        enabled: False gives the stock computation back.

    Returns:
        The same model.

    Raises:
        ValueError: No adapter of the model is on parameters of experts.

    Warns:
        MoePeftWarning: Some of them have to be computed as stock peft does; it says which and why.
    """
    nests = _nests(model)
    if not nests:
        raise ValueError(
            f"{type(model).__name__} has no LoRA adapter on parameters of fused experts, so there is nothing to "
            "accelerate. Make one with get_peft_model(model, LoraConfig(target_modules=[], "
            "target_parameters=moe_peft.expert_parameters(model)))."
        )
    if not enabled:
        for nest in nests.values():
            _set_class(nest, ParamWrapper)
        return model
    sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    reasons = {name: _why_not(nest, sharded) for name, nest in nests.items()}
    for name, nest in nests.items():
        if reasons[name] is None:
            _set_class(nest, AcceleratedParamWrapper)
    refused = {name: reason for name, reason in reasons.items() if reason is not None}
    if refused:
        by_reason: dict[str, list[str]] = {}
        for name, reason in refused.items():
            by_reason.setdefault(reason, []).append(name)
        listed = "; ".join(f"{names[0]} (and {len(names) - 1} more) {reason}" for reason, names in by_reason.items())
        warn(
            f"{len(refused)} of {len(nests)} adapted experts modules run as in stock peft, as the experts cannot be "
            f"computed in activation space: {listed}."
        )
    return model


def _nests(model: nn.Module) -> dict[str, list[ParamWrapper]]:
    """Nests of wrappers by the name of the outermost, which comes first in its list."""
    nests: dict[str, list[ParamWrapper]] = {}
    inside: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper) and id(module) not in inside:
            nests[name] = _nest(module)
            inside.update(id(wrapper) for wrapper in nests[name])
    return nests


def _nest(outermost: object) -> list[ParamWrapper]:
    """A wrapper and those inside it, outermost first."""
    nest: list[ParamWrapper] = []
    while isinstance(outermost, ParamWrapper):
        nest.append(outermost)
        outermost = outermost.base_layer
    return nest


def _does_more(wrapper: ParamWrapper) -> bool:
    """Whether a call of a wrapper does more than its class's forward."""
    return is_watched(wrapper) or "forward" in wrapper.__dict__


def _why_not(nest: list[ParamWrapper], sharded: bool) -> str | None:
    """Why a nest has to be computed as stock peft does; None where it need not."""
    experts = nest[-1].base_layer
    if isinstance(experts, BaseTunerLayer):
        return f"is wrapped by another adapter ({type(experts).__name__})"
    reason = why_not_fused(experts)
    if reason is not None:
        return reason
    names = matrix_names(experts)
    assert names is not None
    if getattr(experts, "_is_expert_parallel", False):
        return "holds the experts of one process only (expert parallelism)"
    if not sharded and any(isinstance(p, DTensor) for p in experts.parameters(recurse=False)):
        return "is split over processes (distributed tensors)"
    for wrapper in nest:
        if wrapper.parameter_name not in names:
            return f"has an adapter on {wrapper.parameter_name}, which is not one of its matrices {names}"
        transposed = bool(getattr(experts, "is_transposed", False))
        if wrapper._did_swap_in_out_features == transposed:
            return "stores its matrices the other way round than peft takes them"
        if wrapper.num_experts != stored_shape(experts, wrapper.parameter_name)[0]:
            return "has adapters of another number of experts"
    return None


def _set_class(nest: list[ParamWrapper], cls: type[ParamWrapper]) -> None:
    for wrapper in nest:
        wrapper.__class__ = cls


def _run(experts: nn.Module, nest: list[ParamWrapper], *args: Any, **kwargs: Any) -> torch.Tensor:
    """The experts' computation with the pairs of a nest's active adapters."""
    call = experts_call(args, kwargs)
    num_experts = stored_shape(experts, DOWN)[0]
    pairs: dict[str, tuple[LowRankPairs, ...]] = {}
    for wrapper in nest:
        if not wrapper.disable_adapters and not wrapper.merged:
            active = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
            pairs[wrapper.parameter_name] = tuple(_pairs_of(wrapper, name, num_experts) for name in active)
    return expert_lora(read_fused(experts, pairs), call.hidden, call.index, call.weights)


def _pairs_of(wrapper: ParamWrapper, adapter_name: str, num_experts: int) -> LowRankPairs:
    """An adapter's tensors as pairs of each expert, views of its own; those of experts without weights left out."""
    own: Any = wrapper
    A, B = own.lora_A[adapter_name].weight, own.lora_B[adapter_name].weight
    stored = own.num_experts
    A, B = A.view(stored, -1, A.shape[1]), B.view(B.shape[0], -1, stored).permute(2, 1, 0)
    if stored > num_experts:
        A, B = A[:num_experts], B[:num_experts]
    return LowRankPairs(A, B, wrapper.scaling[adapter_name])
