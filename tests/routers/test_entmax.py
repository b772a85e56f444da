"""The entmax gate: the optimum over all supports, zeros, sums of one, and gradients at the edges."""

from __future__ import annotations

import itertools

import pytest
import torch

from moe_peft.routers import Dense
from moe_peft.routers.entmax import Entmax
from moe_peft.types import TokenContext
from tests.compare import assert_same

from .made import E, linear


def by_supports(z):
    """The p on the simplex that is largest in p z + sum (p - p^1.5) / 0.75, out of the candidates of all supports."""
    best, value = None, None
    for size in range(1, len(z) + 1):
        for support in itertools.combinations(range(len(z)), size):
            half = z[list(support)] / 2
            room = (1 - (half - half.mean()).square().sum()) / size
            if room < 0:
                continue
            tau = half.mean() - room.sqrt()
            if (half < tau).any():
                continue
            p = torch.zeros_like(z).index_add(0, torch.tensor(support), (half - tau).square())
            gain = (p * z + (p - p**1.5) / 0.75).sum().item()
            if value is None or gain > value + 1e-12:
                best, value = p, gain
    return best


def test_equals_the_optimum_over_all_supports():
    made, x = linear(Dense(), Entmax())
    made.weight.data *= 2
    routing = made(x, TokenContext())
    expected = torch.stack([by_supports(z) for z in (x @ made.weight.T)])
    assert_same(routing.probs, expected, [x, made.weight], [x, made.weight], 1e-9)
    zeros = (routing.probs == 0).sum(-1)
    assert zeros.min() < zeros.max() and (zeros < E).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_sum_to_one_and_shifts_change_nothing(dtype):
    torch.manual_seed(0)
    z = (3 * torch.randn(50, 9)).to(dtype)
    p = Entmax()(z, TokenContext())
    torch.testing.assert_close(p.sum(-1), torch.ones(50, dtype=dtype))
    torch.testing.assert_close(Entmax()(z + 100, TokenContext()), p, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("z", [[1.0, 1.0, 1.0], [2.0, 0.0, 0.0], [50.0, 0.0, -1e9], [0.0, -2.0, -1e9]])
def test_gradients_are_finite_for_ties_and_at_the_edge_of_the_support(z):
    leaf = torch.tensor([z], requires_grad=True)
    p = Entmax()(leaf, TokenContext())
    (p * torch.arange(3.0)).sum().backward()
    assert torch.isfinite(p).all() and torch.isfinite(leaf.grad).all()
    assert abs(p.sum().item() - 1) < 1e-6
