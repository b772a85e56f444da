"""A product of one input with several matrices: the plain product's numbers, with nothing kept but what came in."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from moe_peft.ops import project
from moe_peft.ops.choice import FEW_ROWS
from moe_peft.ops.project import keeps_a_graph
from tests.compare import saved_for_backward

D, ROWS = 7, (5, 3)


def leaves(num_tokens, x_dtype, weight_dtype, x_grad=True, weight_grads=(True, True)):
    torch.manual_seed(0)
    x = torch.randn(num_tokens, D).to(x_dtype).requires_grad_(x_grad)
    weights = [
        torch.randn(rows, D).to(weight_dtype).requires_grad_(grad)
        for rows, grad in zip(ROWS, weight_grads, strict=True)
    ]
    return x, weights


def by_autograd(x, *weights, dtype):
    return F.linear(x.to(dtype), torch.cat(weights).to(dtype))


@pytest.mark.parametrize("num_tokens", [0, 1, 13, 63, FEW_ROWS + 7])
@pytest.mark.parametrize(
    ("x_dtype", "weight_dtype", "dtype"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.float64, torch.float32, torch.float64),
    ],
)
def test_output_and_gradients_are_those_of_autograd_bit_for_bit(num_tokens, x_dtype, weight_dtype, dtype):
    x, weights = leaves(num_tokens, x_dtype, weight_dtype)
    actual, expected = project(x, *weights, dtype=dtype), by_autograd(x, *weights, dtype=dtype)
    assert actual.dtype == dtype and torch.equal(actual, expected)
    upstream = torch.randn(actual.shape).to(dtype)
    for own, theirs in zip(
        torch.autograd.grad(actual, [x, *weights], upstream),
        torch.autograd.grad(expected, [x, *weights], upstream),
        strict=True,
    ):
        assert own.dtype == theirs.dtype and torch.equal(own, theirs)


@pytest.mark.parametrize("x_grad", [False, True])
@pytest.mark.parametrize("weight_grads", [(True, False), (False, True), (False, False)])
def test_only_what_trains_gets_a_gradient(x_grad, weight_grads):
    x, weights = leaves(13, torch.bfloat16, torch.float32, x_grad, weight_grads)
    out = project(x, *weights, dtype=torch.float32)
    assert out.requires_grad == (x_grad or any(weight_grads))
    if out.requires_grad:
        out.sum().backward()
    assert [t.grad is not None for t in (x, *weights)] == [x_grad, *weight_grads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_kept_but_the_input_and_the_matrices(dtype):
    x, weights = leaves(FEW_ROWS + 1, torch.float32, torch.float32)
    kept = saved_for_backward(lambda: project(x, *weights, dtype=dtype), besides=[x, *weights])
    assert not kept
    assert saved_for_backward(lambda: by_autograd(x, *weights, dtype=torch.float64), besides=[x, *weights])


def test_second_derivatives_exist():
    x, weights = (t.double() if isinstance(t, torch.Tensor) else t for t in leaves(3, torch.float64, torch.float64))
    assert torch.autograd.gradgradcheck(project, (x, *weights))


def test_autocast_does_not_round_forward_nor_backward():
    x, weights = leaves(13, torch.float32, torch.float32)
    expected = torch.autograd.grad(project(x, *weights).sum(), [x, *weights])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = torch.autograd.grad(project(x, *weights).sum(), [x, *weights])
    assert all(torch.equal(own, theirs) for own, theirs in zip(actual, expected, strict=True))


def test_function_transforms_and_compilers_see_plain_operators():
    x, weights = leaves(13, torch.bfloat16, torch.float32)
    assert keeps_a_graph(x) and not keeps_a_graph(x.detach())
    with torch.no_grad():
        assert not keeps_a_graph(x)

    def loss(weight):
        return project(x.detach(), weight, weights[1].detach(), dtype=torch.float32).square().sum()

    (expected,) = torch.autograd.grad(loss(weights[0]), weights[0])
    torch.testing.assert_close(torch.func.grad(loss)(weights[0].detach()), expected)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(weights[0]), weights[0])[0], expected)
