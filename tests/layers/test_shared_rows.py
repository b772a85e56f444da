"""When experts and router are read instead of called: many rows, and calls that are the class's forward alone."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

import moe_peft.layers.routed_layer as module_of_layers
import moe_peft.layers.shared_rows as module_of_rows
from moe_peft import MoloraConfig
from moe_peft.experts import LowRankExperts
from moe_peft.layers.shared_rows import is_plain, products, shared_rows
from moe_peft.ops.choice import SEPARATE_ROWS
from moe_peft.routers import DenseRouter
from moe_peft.types import TokenContext


def hooked(module):
    module.register_forward_hook(lambda *args: None)


def replaced(module):
    module.forward = module.forward


@pytest.mark.parametrize(
    "change",
    [
        hooked,
        replaced,
        lambda module: module.register_forward_pre_hook(lambda *args: None),
        lambda module: module.register_full_backward_hook(lambda *args: None),
        lambda module: module.compile(backend="eager"),
        lambda module: module.to("meta"),
    ],
)
def test_a_module_whose_call_does_more_than_its_forward_is_not_plain(change):
    module = nn.Linear(2, 2)
    assert is_plain(module)
    change(module)
    assert not is_plain(module)


def test_a_hook_on_all_modules_is_seen_too():
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert not is_plain(nn.Linear(2, 2))
    finally:
        handle.remove()


@pytest.mark.parametrize(("dtype", "read"), [(torch.float32, True), (torch.bfloat16, False)])
def test_rows_of_full_precision_are_read_for_experts_and_router(dtype, read):
    router, bank = DenseRouter(6, 4), LowRankExperts(6, 5, num_experts=4, r=2, scaling=1.0)
    x, context = torch.randn(3, 6, dtype=dtype), TokenContext()
    found = shared_rows(router, bank, x, context)
    assert (found is not None) == read
    if found is not None:
        assert torch.equal(found[0], bank.A.flatten(0, 1)) and found[1] is router.weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert shared_rows(router, bank, x, context) is None, "scores would be rounded"


def test_one_product_serves_experts_and_router(monkeypatch):
    made = []
    own = module_of_rows.project
    monkeypatch.setattr(module_of_rows, "project", lambda x, *weights: made.append(len(weights)) or own(x, *weights))
    x, A, W = torch.randn(9, 6), torch.randn(8, 6), torch.randn(4, 6)
    for found, weight in zip(products(x, A, W), (A, W), strict=True):
        torch.testing.assert_close(found, x @ weight.T)
    assert made == [2]


@pytest.mark.parametrize(("num_tokens", "joined"), [(0, 0), (SEPARATE_ROWS, 0), (SEPARATE_ROWS + 1, 1)])
def test_matrices_are_joined_for_many_rows_alone(num_tokens, joined, monkeypatch):
    made = []
    own = module_of_layers.products
    monkeypatch.setattr(module_of_layers, "products", lambda *args: made.append(1) or own(*args))
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), MoloraConfig(target_modules=["0"], num_experts=4, r=2))
    assert model(torch.randn(num_tokens, 6)).shape == (num_tokens, 5)
    assert len(made) == joined
