"""Siblings that read one 16-bit input share its float32 copy, in both directions, and no other input ever gets it."""

from __future__ import annotations

import gc
import sys
import threading
import weakref

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import moe_peft
from moe_peft.forward import shared_cast as module
from moe_peft.forward.shared_cast import LAST, forget_cast, shared_cast
from tests.tiny import tiny_llama

T, D = 80, 64


class Casts(TorchDispatchMode):
    """Counts casts of (T, D) inputs to float32."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.count += args[0].dtype == torch.bfloat16 and out.dtype == torch.float32 and out.numel() == T * D
        return out


class Siblings(nn.Module):
    def __init__(self, count=3):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(D, 24) for _ in range(count))

    def forward(self, x):
        return sum(linear(x).float().square().sum() for linear in self.linears)


def adapted(method, count=3):
    torch.manual_seed(0)
    config = method(target_modules=r"linears\.\d", init_weights=False, router_aux_loss_coef=0.0)
    return get_peft_model(Siblings(count).to(torch.bfloat16), config, autocast_adapter_dtype=False)


def gradients(model, x):
    torch.manual_seed(1)  # of dropout
    model.zero_grad()
    leaf = x.detach().clone().requires_grad_()
    model(leaf).backward()
    own = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**own, "x": leaf.grad}


@pytest.fixture(autouse=True)
def _forget():
    forget_cast()
    yield
    forget_cast()


@pytest.mark.parametrize("method", [moe_peft.LoraMoeConfig, moe_peft.MoloraConfig, moe_peft.RoutedConfig])
def test_siblings_cast_once_in_each_direction_with_the_same_gradients(method, monkeypatch):
    model, x = adapted(method), torch.randn(2, T // 2, D).to(torch.bfloat16)
    with Casts() as shared:
        own = gradients(model, x)
    monkeypatch.setattr(sys.modules["moe_peft.ops.project"], "shared_cast", lambda x, dtype: x.to(dtype))
    with Casts() as apart:
        theirs = gradients(model, x)
    # Other casts of as many numbers, as of gradients, are the same in both.
    assert apart.count - shared.count == 2 * (len(model.base_model.model.linears) - 1)
    assert own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own)


def test_an_input_that_has_been_written_to_is_cast_again():
    x = torch.randn(T, D).to(torch.bfloat16)
    with torch.no_grad():
        first = shared_cast(x, torch.float32)
        assert shared_cast(x.view(2, -1, D).view(T, D), torch.float32) is first
        x.mul_(2)
        assert torch.equal(shared_cast(x, torch.float32), x.float())
        assert torch.equal(shared_cast(x, torch.float64), x.double())


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x[: T // 2],
        lambda x: x[T // 2 :],
        lambda x: x.T,
        lambda x: x.clone(),
        lambda x: x.view(torch.float16),
        lambda x: x[:, : D // 2].reshape(-1, D),
    ],
)
def test_other_inputs_get_a_cast_of_their_own(other):
    x = torch.randn(T, D).to(torch.bfloat16)
    with torch.no_grad():
        shared_cast(x, torch.float32)
        assert torch.equal(shared_cast(other(x), torch.float32), other(x).float())


def test_memory_that_is_reused_is_not_taken_for_the_input():
    with torch.no_grad():
        for _ in range(20):
            x = torch.randn(T, D).to(torch.bfloat16)
            assert torch.equal(shared_cast(x, torch.float32), x.float())
            del x


def test_nothing_is_kept_after_a_pass_of_the_model_nor_after_a_backward_pass():
    config = moe_peft.LoraMoeConfig(target_modules=["gate_proj", "up_proj"])
    model = get_peft_model(tiny_llama().to(torch.bfloat16), config, autocast_adapter_dtype=False).train()
    input_ids = torch.randint(1, 30, (2, 40))
    made = []
    original = module.LastCast.holds

    def holds(self, x, dtype):
        made.append(original(self, x, dtype))
        return made[-1]

    module.LastCast.holds = holds
    try:
        loss = model(input_ids=input_ids, labels=input_ids).loss
        assert made.count(True) == made.count(False) > 0 and LAST.copy is None
        made.clear()
        loss.backward()
        assert made.count(True) == made.count(False) > 0 and LAST.copy is None
    finally:
        module.LastCast.holds = original


def test_a_copy_lives_until_another_input_is_cast_and_threads_have_their_own():
    with torch.no_grad():
        x = torch.randn(T, D).to(torch.bfloat16)
        copy = weakref.ref(shared_cast(x, torch.float32))
        found = []
        thread = threading.Thread(target=lambda: found.append(LAST.copy))
        thread.start()
        thread.join()
        assert found == [None] and copy() is not None
        shared_cast(torch.randn(T, D).to(torch.bfloat16), torch.float32)
        gc.collect()
        assert copy() is None


def test_the_end_of_a_backward_pass_lets_go_what_its_thread_has_cast_whoever_tells(monkeypatch):
    told = []
    x, leaf = torch.randn(T, D).to(torch.bfloat16), torch.ones(1, requires_grad=True)

    class Engine:
        queue_callback = told.append

    def cast(gradient):
        with monkeypatch.context() as patch:
            patch.setattr(torch.autograd.Variable, "_execution_engine", Engine)
            with torch.no_grad():
                shared_cast(x, torch.float32)

    out = leaf * 2
    out.register_hook(cast)
    out.backward()
    assert LAST.copy is not None and len(told) == 1
    thread = threading.Thread(target=told[0])
    thread.start()
    thread.join()
    assert LAST.copy is None and LAST.source is None


def test_where_gradients_are_enabled_the_copy_has_a_graph():
    x = torch.randn(T, D, dtype=torch.bfloat16, requires_grad=True)
    with torch.no_grad():
        shared_cast(x, torch.float32)
    assert shared_cast(x, torch.float32).requires_grad
    with torch.inference_mode():
        other = torch.randn(T, D).to(torch.bfloat16)
        assert torch.equal(shared_cast(other, torch.float32), other.float())
