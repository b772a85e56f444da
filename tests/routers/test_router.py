"""What every router shares: float32 scores, noise in training only, weights that are never rounded."""

from __future__ import annotations

import pytest
import torch

from moe_peft.routers import ROUTERS, DenseRouter, LinearRouter, TopKRouter
from moe_peft.routers.router import gate_probs
from moe_peft.types import TokenContext
from tests import reference

D, E = 7, 4
TRAINING = TokenContext(training=True)
LINEAR = sorted(name for name, router in ROUTERS.items() if issubclass(router, LinearRouter))


def make(name, **kwargs):
    if name != "dense":
        kwargs.setdefault("top_k", 2)
    torch.manual_seed(0)
    return ROUTERS[name](D, E, **kwargs)


@pytest.mark.parametrize("name", LINEAR)
def test_scores_are_the_linear_map(name):
    router = make(name).double()
    x = torch.randn(13, D, dtype=torch.float64)
    expected = torch.stack([torch.stack(row) for row in reference.router_logits(x, router.weight)])
    torch.testing.assert_close(router.scores(x, TokenContext()), expected)
    torch.testing.assert_close(router(x, TokenContext()).logits, expected)


@pytest.mark.parametrize("name", LINEAR)
def test_scores_of_16_bit_inputs_are_float32_also_under_autocast(name):
    router = make(name)
    x = torch.randn(13, D).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = router.scores(x, TokenContext())
    assert scores.dtype == torch.float32
    assert torch.equal(scores, x.float() @ router.weight.T)
    assert router(x, TokenContext()).weights.dtype == torch.float32


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
def test_cast_to_16_bit_keeps_the_weight_unrounded(cast):
    router = make("dense")
    before = router.weight.detach().clone()
    getattr(router, cast)()
    assert router.weight.dtype == torch.float32 and torch.equal(router.weight, before)


def test_cast_to_float64_is_followed():
    assert make("dense").double().weight.dtype == torch.float64


def test_16_bit_scores_would_select_other_experts():
    # The reason for float32 scores; if this fails, they are needless.
    torch.manual_seed(0)
    router = TopKRouter(64, 30, top_k=4)
    x = torch.randn(2000, 64)
    exact = router(x, TokenContext()).experts.sort(-1).values
    rounded = (x.bfloat16() @ router.weight.T.bfloat16()).float().topk(4).indices.sort(-1).values
    changed = (exact != rounded).any(-1).float().mean()
    assert 0.001 < changed < 0.2


def test_jitter_scales_each_input_element_within_its_half_width_in_training_only():
    router = make("dense", router_jitter_noise=0.1)
    with torch.no_grad():
        router.weight.zero_()
        router.weight[0, 0] = 1.0
    x = torch.ones(2000, D)
    noise = router.scores(x, TRAINING)[:, 0]
    assert noise.min() >= 0.9 and noise.max() <= 1.1 and noise.std() > 0.05
    assert torch.equal(router.scores(x, TokenContext())[:, 0], torch.ones(2000))
    assert router.jitters(TRAINING) and not router.jitters(TokenContext())


def test_kept_gates_are_divided_by_one_minus_p():
    logits = torch.randn(200, E, dtype=torch.float64)
    plain = logits.softmax(-1)
    torch.manual_seed(0)
    dropped = gate_probs(logits, 0.4, TRAINING)
    kept = dropped != 0
    torch.testing.assert_close(dropped, torch.where(kept, plain / 0.6, 0.0))
    assert 0.5 < kept.double().mean() < 0.7


def test_gate_dropout_is_silent_outside_training():
    logits = torch.randn(20, E)
    assert torch.equal(gate_probs(logits, 0.4, TokenContext()), logits.softmax(-1))


@pytest.mark.parametrize("name", LINEAR)
def test_a_decision_depends_on_its_own_token_alone_in_evaluation(name):
    router = make(name)
    x = torch.randn(13, D)
    changed = x.clone()
    changed[5] = 9.0
    one, other = router(x, TokenContext()).gate_matrix(), router(changed, TokenContext()).gate_matrix()
    others = torch.arange(13) != 5
    assert torch.equal(one[others], other[others])
    assert not torch.equal(one[5], other[5])


@pytest.mark.parametrize("name", LINEAR)
def test_no_tokens_give_an_empty_decision(name):
    routing = make(name)(torch.zeros(0, D), TRAINING)
    assert routing.gate_matrix().shape == (0, E) and routing.request_matrix().shape == (0, E)


def test_initialisation_is_uniform_as_in_linear_or_normal_with_the_given_deviation():
    torch.manual_seed(0)
    uniform = DenseRouter(400, 50).weight
    assert uniform.abs().max() <= 400**-0.5 and uniform.abs().max() > 0.99 * 400**-0.5
    normal = DenseRouter(400, 50, init_std=0.02).weight
    assert abs(float(normal.std()) - 0.02) < 0.001


def test_only_a_router_of_one_expert_is_mergeable():
    assert DenseRouter(D, 1).mergeable and not DenseRouter(D, 2).mergeable
