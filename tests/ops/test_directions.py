"""Directions are those of the formula, and zero vectors have none and no gradient beyond that of their values."""

from __future__ import annotations

import torch

from moe_peft.ops import directions


def test_vectors_have_a_length_of_one_whatever_they_had():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(directions(x), torch.nn.functional.normalize(x, dim=-1), rtol=1e-14, atol=0)
    torch.testing.assert_close(directions(1e4 * x), directions(x))
    assert torch.autograd.gradcheck(directions, (x,))


def test_zero_vectors_stay_zero_with_a_gradient_of_the_size_of_others():
    x = torch.zeros(2, 3, requires_grad=True)
    y = directions(x)
    y.sum().backward()
    assert not y.any() and x.grad.abs().max() <= 1
