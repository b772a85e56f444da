"""The mean softplus of several maps' outputs: the formula, in slices, of which nothing is kept."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from moe_peft.ops import mean_softplus
from tests.compare import assert_same, saved_for_backward

E, R = 3, 2


def inputs(num_tokens: int, width: int, dtype=torch.float64):
    torch.manual_seed(0)
    return (torch.randn(*shape).to(dtype).requires_grad_() for shape in ((num_tokens, E, R), (E, R, width)))


@pytest.mark.parametrize("num_tokens", [0, 1, 13])
@pytest.mark.parametrize("width", [5, 512, 1030])
def test_equals_the_formula(num_tokens, width):
    h, B = inputs(num_tokens, width)
    expected = F.softplus(torch.einsum("ter,ero->teo", h, B)).mean(-1)
    assert_same(mean_softplus(h, B), expected, [h, B], [h, B], 1e-10)
    with torch.no_grad():
        torch.testing.assert_close(mean_softplus(h, B), expected, rtol=1e-12, atol=1e-12)


def test_a_map_of_zeros_answers_the_logarithm_of_two():
    h, _ = inputs(4, 5)
    torch.testing.assert_close(mean_softplus(h, torch.zeros(E, R, 5).double()).exp(), torch.full((4, E), 2.0).double())


def test_16_bit_inputs_are_answered_in_float32():
    h, B = inputs(4, 5, torch.bfloat16)
    found = mean_softplus(h, B)
    assert found.dtype == torch.float32
    found.sum().backward()
    assert h.grad.dtype == B.grad.dtype == torch.bfloat16


def test_no_output_is_kept_for_the_backward_pass():
    h, B = inputs(64, 40)
    kept = saved_for_backward(lambda: mean_softplus(h, B), [h, B])
    assert sum(tensor.numel() for tensor in kept) <= h.numel()
