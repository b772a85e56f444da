"""Which way multiplies the rows of slots, that it is the one that runs, and that it waits for no device."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_peft.ops import expert_rows
from moe_peft.ops.expert_lora import expert_lora
from moe_peft.ops.expert_rows import PATHS, Rows, choose_path
from tests.ops.fused import experts_with_pairs, slots


@pytest.mark.parametrize(
    ("num_tokens", "grad", "dtype", "path"),
    [
        (63, True, torch.float32, "grouped"),
        (63, True, torch.bfloat16, "grouped"),
        (63, True, torch.float64, "segment"),
        (1, True, torch.float32, "grouped"),
        (1, False, torch.float32, "slots"),
        (8, False, torch.float64, "slots"),
        (9, False, torch.float64, "segment"),
        (9, False, torch.bfloat16, "grouped"),
    ],
)
def test_the_chosen_path_is_the_one_that_runs(num_tokens, grad, dtype, path, monkeypatch):
    experts, _ = experts_with_pairs(dtype=dtype)
    x, index, weights = slots(num_tokens, 2, 4)
    ran = []
    for name, cls in PATHS.items():
        spied = type(name, (cls,), {"linear": _spy(cls, name, ran)})
        monkeypatch.setitem(expert_rows.PATHS, name, spied)
    with torch.set_grad_enabled(grad):
        assert choose_path(2 * num_tokens, experts.first.stack) == path
        expert_lora(experts, x.detach().to(dtype), index, weights.detach().to(dtype))
    assert ran == [path, path]


def _spy(cls, name, ran):
    def linear(self, *args):
        ran.append(name)
        return cls.linear(self, *args)

    return linear


class Operators(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("path", ["grouped", "gather"])
def test_no_operator_waits_for_a_device(path):
    experts, _ = experts_with_pairs(dtype=torch.float32, ranks=(4,))
    x, index, weights = slots(13, 2, 4)
    y = x.detach().float().requires_grad_()
    with Operators() as seen:
        expert_lora(experts, y, index, weights.detach().float(), path).sum().backward()
    assert not {"_local_scalar_dense", "nonzero", "item", "bincount"} & set(seen.names)


def test_rows_are_sorted_by_expert_and_come_back_to_their_tokens():
    index = torch.tensor([[2, 0], [0, 3], [2, 2]])
    rows = Rows(index, 4)
    assert rows.experts_N.tolist() == [0, 0, 2, 2, 2, 3]
    assert rows.ends_E.tolist() == [2, 2, 5, 6]
    hidden = torch.arange(3.0)[:, None]
    taken = rows.take(hidden)
    assert taken.squeeze(1).tolist() == [0, 1, 0, 2, 2, 1]
    assert torch.equal(rows.sum_slots(taken, torch.ones(3, 2)), 2 * hidden)


def test_a_way_must_say_how_it_multiplies():
    experts, _ = experts_with_pairs()
    with pytest.raises(NotImplementedError, match="Rows"):
        Rows(torch.tensor([[0]]), 4).linear(torch.ones(1, 8), experts.first)
