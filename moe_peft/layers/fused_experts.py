"""Reads a backbone's experts module as the pass of expert LoRA needs it, in every layout of transformers' interface.

A module with the interface's flags says how it computes. One without is taken for the plain form (act(gate) * up,
experts without weights return their input) where a trial on a few rows gives the module's own output.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from ..backbone.experts_call import takes_routing
from ..backbone.partitioned import is_partitioned, shape_of
from ..backbone.structure import FIRST_MATRICES
from ..ops.expert_lora import expert_lora
from ..ops.expert_stacks import AdaptedMatrix, FusedExperts, LowRankPairs, PlainStack
from ..quantization.packed_stack import packed_stack

DOWN = "down_proj"
# Scales of a trial's input: clamps of an activation act on large values alone.
TRIAL_SCALES = (1.0, 100.0)


def matrix_names(experts: nn.Module) -> tuple[str, str] | None:
    """Names of the first and the last matrix; None for a module that has no such two.

    Args:
        experts: The backbone's experts module.
    """
    held = set(experts._parameters) | set(getattr(experts, "parametrizations", {}))
    first = next((name for name in FIRST_MATRICES if name in held), None)
    return None if first is None or DOWN not in held else (first, DOWN)


def read_fused(experts: nn.Module, pairs: Mapping[str, tuple[LowRankPairs, ...]] | None = None) -> FusedExperts:
    """The module's matrices and what stands between them, with low-rank pairs on the matrices.

    Args:
        experts: An experts module that `why_not_fused` takes.
        pairs: Name of a matrix -> pairs of the active adapters.

    Raises:
        ValueError: The matrices are split over processes.
    """
    names = matrix_names(experts)
    assert names is not None
    first, down = names
    num_experts = stored_shape(experts, down)[0]
    own = pairs or {}
    norm = experts.post_expert_norm if getattr(experts, "has_post_expert_norm", False) else None
    return FusedExperts(
        first=_matrix(experts, first, num_experts, own.get(first, ())),
        down=_matrix(experts, down, num_experts, own.get(down, ())),
        gate=_gate(experts),
        norm=norm,  # type: ignore[arg-type]
        identity_beyond=stored_shape(experts, first)[0] > num_experts,
    )


def stored_shape(experts: nn.Module, name: str) -> tuple[int, ...]:
    """Shape of a matrix as it is stored, of packed ones as they unpack.

    Args:
        experts: The experts module.
        name: The matrix's name.
    """
    own = experts._parameters.get(name)
    if own is not None:
        return shape_of(own)
    state = getattr(experts.parametrizations[name][0], "quant_state", None)  # type: ignore[index]
    return tuple(getattr(experts, name).shape if state is None else state.shape)


def _matrix(experts: nn.Module, name: str, num_experts: int, pairs: tuple[LowRankPairs, ...]) -> AdaptedMatrix:
    transposed = bool(getattr(experts, "is_transposed", False))
    packed = packed_stack(experts, name, is_transposed=transposed, num_experts=num_experts)
    bias = getattr(experts, f"{name}_bias", None) if getattr(experts, "has_bias", False) else None
    if packed is not None:
        return AdaptedMatrix(packed, bias, pairs)
    weight = getattr(experts, name)
    if isinstance(weight, DTensor):
        raise ValueError(
            f"{name} of {type(experts).__name__} is split over processes where it is used, so its low-rank pairs "
            "cannot be applied to activations here. Call moe_peft.accelerate_expert_lora(model, False), or load the "
            "model without tensor and expert parallelism."
        )
    stack = PlainStack(weight, is_transposed=transposed, num_experts=num_experts)
    return AdaptedMatrix(stack, bias, pairs)


def _gate(experts: Any) -> Any:
    if not getattr(experts, "has_gate", True):
        return experts.act_fn
    if hasattr(experts, "_apply_gate"):
        return experts._apply_gate
    return lambda joined: _gated(experts, joined)


def _gated(experts: Any, joined: torch.Tensor) -> torch.Tensor:
    gate, up = joined.chunk(2, dim=-1)
    return experts.act_fn(gate) * up


def why_not_fused(experts: nn.Module) -> str | None:
    """Why the pass cannot stand for a module's own computation; None where it can.

    Args:
        experts: Any module; no weight is changed.

    Returns:
        The end of a sentence that begins with the module.
    """
    names = matrix_names(experts)
    if names is None or not takes_routing(type(experts)):
        return "is not called with (hidden, index, weights), or keeps its experts in another form than two stacks"
    if any(len(stored_shape(experts, name)) != 3 for name in names):
        return "keeps its experts in another form than one (in, out) matrix each"
    own = [p for n, p in experts.named_parameters(recurse=False) if n in names]
    if any(not p.is_floating_point() or p.element_size() == 1 for p in own):
        return "has quantized experts that are not 4-bit ones of bitsandbytes"
    packed = [name for name in names if parametrize.is_parametrized(experts, name)]
    if any(packed_stack(experts, name, is_transposed=False) is None for name in packed):
        return "has weights that are computed by another parametrization"
    if hasattr(experts, "has_gate"):
        return None
    return None if _agrees(experts) else "computes its experts in a way of its own"


@torch.no_grad()
def _agrees(experts: nn.Module) -> bool:
    """Whether the pass gives a module's own output on a few rows; weights that are not here do not."""
    away = any(p.is_meta or isinstance(p, DTensor) or is_partitioned(p) for p in experts.parameters())
    if away or not hasattr(experts, "act_fn"):
        return False
    fused = read_fused(experts)
    matrix, num_experts = fused.first.stack, fused.num_experts
    generator = torch.Generator().manual_seed(0)
    width = matrix.matrix(0).shape[0]
    limit = stored_shape(experts, matrix_names(experts)[0])[0]  # type: ignore[index]
    index_TK = torch.tensor([[0, limit - 1], [num_experts - 1, 0], [num_experts // 2, limit - 1]])
    weights_TK = torch.rand(index_TK.shape, generator=generator) + 0.1
    x_TD = torch.randn(len(index_TK), width, generator=generator)
    for scale in TRIAL_SCALES:
        call = (
            (x_TD * scale).to(matrix.device, matrix.dtype),
            index_TK.to(matrix.device),
            weights_TK.to(matrix.device, matrix.dtype),
        )
        try:
            expected = type(experts).forward(experts, *call)  # not its hooks: this is no forward of the model
        except (RuntimeError, TypeError, ValueError, IndexError):
            return False
        actual = expert_lora(fused, *call)
        tolerance = 0.05 if matrix.dtype.itemsize == 2 else 1e-4
        if expected.shape != actual.shape or not bool(
            ((expected - actual).abs() <= tolerance * expected.abs().max()).all()
        ):
            return False
    return True
