"""The Gumbel-softmax gate: draws follow the softmax, evaluation is without noise, hard draws have soft gradients."""

from __future__ import annotations

import pytest
import torch

from moe_peft.routers import Dense
from moe_peft.routers.gumbel import Gumbel
from moe_peft.types import TokenContext
from tests.compare import assert_same

from .made import TRAINING, E, linear


def noise_of(seed, shape):
    torch.manual_seed(seed)
    return -torch.empty(shape, dtype=torch.float64).exponential_().log()


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_equals_the_formula_on_the_same_noise(hard, training):
    z = torch.randn(13, E, dtype=torch.float64, requires_grad=True)
    noise = noise_of(3, z.shape) if training else torch.zeros_like(z)
    soft = ((z + noise) / 0.7).softmax(-1)
    torch.manual_seed(3)
    found = Gumbel(tau=0.7, hard=hard)(z, TokenContext(training=training))
    if hard:
        torch.testing.assert_close(found, torch.eye(E).double()[soft.argmax(-1)], rtol=0, atol=1e-15)
        if training:
            assert_same(found - found.detach(), soft - soft.detach(), [z], [z])
    else:
        assert_same(found, soft, [z], [z])


def test_hard_draws_follow_the_softmax():
    torch.manual_seed(0)
    z = torch.tensor([0.0, 1.0, -1.0, 0.5]).double()
    counts = Gumbel(hard=True)(z.expand(20_000, -1), TRAINING).mean(0)
    torch.testing.assert_close(counts, z.softmax(-1), rtol=0, atol=0.01)


def test_what_perturbs_training_can_be_switched_off():
    made, x = linear(Dense(), Gumbel())
    assert not torch.equal(made(x, TRAINING).weights, made(x, TokenContext()).weights)
    made.perturbs_training = False
    assert torch.equal(made(x, TRAINING).weights, made(x, TokenContext()).weights)
