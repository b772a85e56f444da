"""The relaxed Bernoulli gate: the formula on the same noise, independent draws, and no division by zero."""

from __future__ import annotations

import pytest
import torch

from moe_peft.routers import Dense
from moe_peft.routers.relaxed_bernoulli import RelaxedBernoulli
from moe_peft.types import TokenContext
from tests.compare import assert_same

from .made import TRAINING, E, linear


@pytest.mark.parametrize("training", [False, True])
def test_equals_the_formula_on_the_same_noise(training):
    torch.manual_seed(0)
    z = torch.randn(13, E, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    u = torch.rand(z.shape, dtype=torch.float64)
    noise = u.log() - (1 - u).log() if training else torch.zeros_like(u)
    b = ((z + noise) / 0.7).sigmoid()
    torch.manual_seed(3)
    found = RelaxedBernoulli(tau=0.7)(z, TokenContext(training=training))
    assert_same(found, b / b.sum(-1, keepdim=True), [z], [z], 1e-10)


def test_equals_the_draws_of_torchs_distribution_in_law():
    z = torch.tensor([0.0, 1.0, -1.0]).double().expand(20_000, -1)
    torch.manual_seed(0)
    own = RelaxedBernoulli()(z, TRAINING)
    b = torch.distributions.RelaxedBernoulli(torch.ones(1).double(), logits=z).rsample()
    stock = b / b.sum(-1, keepdim=True)
    for power in (1, 2):
        torch.testing.assert_close(own.pow(power).mean(0), stock.pow(power).mean(0), rtol=0, atol=0.01)


def test_experts_that_nothing_speaks_for_leave_finite_weights():
    p = RelaxedBernoulli()(torch.tensor([[-200.0, -201.0, -1e9]]), TokenContext())
    torch.testing.assert_close(p, torch.tensor([[-200.0, -201.0, -1e9]]).softmax(-1))


def test_what_perturbs_training_can_be_switched_off():
    made, x = linear(Dense(), RelaxedBernoulli())
    assert not torch.equal(made(x, TRAINING).weights, made(x, TokenContext()).weights)
    made.perturbs_training = False
    assert torch.equal(made(x, TRAINING).weights, made(x, TokenContext()).weights)
