"""What computes a process's experts is changed for one call; tests/processes/test_split.py has several processes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from moe_peft.backbone.local_experts import LocalExperts, is_split_alone, local_experts
from tests.contract.cases import tiny_olmoe
from tests.shared_experts import group_of_one, shared_out


@pytest.fixture
def experts(tmp_path):
    with group_of_one(tmp_path):
        yield shared_out(tiny_olmoe()).model.layers[0].mlp.experts


def call():
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(5, 32, generator=generator)
    return x_TD, torch.tensor([[0, 1], [3, 2], [1, 0], [2, 3], [0, 3]]), torch.rand(5, 2, generator=generator)


def test_experts_that_are_loaded_so_compute_as_they_did(experts):
    expected = tiny_olmoe().model.layers[0].mlp.experts(*call())
    torch.testing.assert_close(experts(*call()), expected)
    with torch.no_grad():
        torch.testing.assert_close(experts(*call()), expected)


def test_other_modules_have_no_local_experts(experts):
    assert isinstance(local_experts(experts), LocalExperts) and not is_split_alone(experts)
    assert local_experts(nn.Linear(2, 2)) is None
    whole = tiny_olmoe().model.layers[0].mlp.experts
    assert local_experts(whole) is None and not is_split_alone(whole)


def test_another_way_of_bringing_tokens_leaves_experts_split_alone(tmp_path):
    with group_of_one(tmp_path):
        assert is_split_alone(shared_out(tiny_olmoe(), "all_to_all").model.layers[0].mlp.experts)


@pytest.mark.parametrize("outer_replaces", [True, False])
def test_what_stands_beside_the_experts_stays_beside_them_however_layers_are_nested(experts, outer_replaces):
    local, plain = local_experts(experts), experts(*call())
    ways = [
        {"change": lambda own, x, i, w: 2 * own(x, i, w), "replaces": True},
        {"change": lambda own, x, i, w: own(x, i, w) + w.sum(-1, keepdim=True), "replaces": False},
    ]
    outer, inner = ways if outer_replaces else ways[::-1]
    with torch.no_grad(), local.changed(**outer), local.changed(**inner):
        changed = experts(*call())
    torch.testing.assert_close(changed, 2 * plain + call()[2].sum(-1, keepdim=True))
    torch.testing.assert_close(experts(*call()), plain)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_nothing(experts, error):
    def fail(own, *call):
        raise error

    with pytest.raises(error), local_experts(experts).changed(fail):
        experts(*call())
    assert experts(*call()).isfinite().all()


def test_gradients_are_those_of_the_mean_over_batches(experts):
    local = local_experts(experts)
    local.num_batches = 4
    tensor = torch.ones(3, requires_grad=True)
    (2 * local.read(tensor)).sum().backward()
    assert tensor.grad.tolist() == [0.5] * 3
    assert not local.read(tensor.detach()).requires_grad


def test_a_copy_of_a_module_shares_what_its_forward_calls(experts):
    assert copy.deepcopy(local_experts(experts)) is local_experts(experts)
