"""Checks that fused experts computed with copies of their tensors give what the module itself gives.

A stand-in shares everything of a module's class but the tensors and the number of experts (see `run_experts`). Whether
that is enough depends on code of transformers', so the module itself is asked, with two tokens.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..messages import shown
from .expert_tensors import expert_tensors, own_class, run_experts
from .experts_call import takes_routing
from .partitioned import is_partitioned

# Largest difference by the bytes of a number, in shares of the largest output.
TOLERANCE = {2: 0.05, 4: 1e-3, 8: 1e-6}
# Errors that code raises that reads what a stand-in does not have.
FAILURES = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def stand_in_fault(experts: nn.Module, num_experts: int, width: int) -> str | None:
    """Why computing experts with copies of their tensors would not be what the module computes.

    Of weights that are not here, or not in 16 or 32 bit, the call alone is looked at.

    Args:
        experts: The backbone's experts module.
        num_experts: E.
        width: D, of its input.

    Returns:
        The end of a sentence that begins with the module; None where nothing is found.
    """
    packed = list(experts.parametrizations) if parametrize.is_parametrized(experts) else []  # type: ignore[arg-type]
    cls = own_class(experts, [*(name for name, _ in experts.named_parameters(recurse=False)), *packed])
    if not takes_routing(cls):
        return "is not called with (hidden, index, weights)"
    here = [
        type(p) is nn.Parameter and p.is_floating_point() and not p.is_meta and not is_partitioned(p)
        for p in experts.parameters()
    ]
    return _fault_in_a_trial(experts, cls, num_experts, width) if all(here) and not packed else None


@torch.no_grad()
def _fault_in_a_trial(experts: nn.Module, cls: type[nn.Module], num_experts: int, width: int) -> str | None:
    """Send two tokens through the last and the first expert, and through copies of them."""
    tensors = expert_tensors(experts, num_experts)
    like, ids = next(iter(tensors.values())), list(dict.fromkeys((num_experts - 1, 0)))
    x_TD = torch.linspace(-1, 1, 2 * width).view(2, width).to(like)
    index_TK = torch.tensor([[0, len(ids) - 1], [len(ids) - 1, 0]], device=like.device)
    weights_TK = torch.tensor([[0.75, 0.25], [0.5, 0.125]]).to(like)
    own_index_TK = torch.tensor(ids, device=like.device)[index_TK]
    try:
        expected: torch.Tensor = cls.forward(experts, x_TD, own_index_TK, weights_TK)  # without the module's hooks
    except RuntimeError:
        return None  # it does not run where its weights are
    copies = {name: tensor[ids] for name, tensor in tensors.items()}
    try:
        found = run_experts(experts, copies, num_experts, x_TD, index_TK, weights_TK)
    except FAILURES as error:
        return f"cannot be computed with copies of its experts ({shown(str(error))})"
    return None if _equal(found, expected) else "gives another output with copies of its experts than with its own"


def _equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    tolerance = TOLERANCE[expected.dtype.itemsize]
    largest = float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max())
    same_shape = found.shape == expected.shape
    return same_shape and torch.allclose(found, expected, rtol=tolerance, atol=tolerance * largest, equal_nan=True)
