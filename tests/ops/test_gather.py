"""Gathering few slots: what it reads; its numbers are compared with the others' in test_sorted_slots."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_peft.ops import gather_experts
from tests.compare import random_routing


class Operators(TorchDispatchMode):
    """Notes the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_a_device():
    torch.manual_seed(0)
    x, base, A, B = torch.randn(1, 8), torch.randn(1, 8), torch.randn(16, 4, 8), torch.randn(16, 4, 8)
    routing = random_routing(1, 16, 2)
    with Operators() as operators, torch.no_grad():
        gather_experts(x, base, A, B, routing, scaling=1.0)
    assert "aten::bmm" in operators.names
    assert not {"aten::_local_scalar_dense", "aten::nonzero", "aten::item"} & set(operators.names)
