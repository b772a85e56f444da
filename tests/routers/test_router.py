"""What every router shares: float32 scores, noise in training only, weights that are never rounded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from moe_peft.routers import ROUTERS, Dense, DenseRouter, Gate, LinearRouter, Router, Selector, TopKRouter
from moe_peft.types import Routing, TokenContext
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
    torch.manual_seed(0)
    plain, dropped = make("dense").decide(logits, TRAINING).probs, make("dense", expert_dropout=0.4)
    dropped = dropped.decide(logits, TRAINING).probs
    kept = dropped != 0
    torch.testing.assert_close(dropped, torch.where(kept, plain / 0.6, 0.0))
    assert 0.5 < kept.double().mean() < 0.7


def test_gate_dropout_is_silent_outside_training():
    logits = torch.randn(20, E)
    assert torch.equal(make("dense", expert_dropout=0.4).decide(logits, TokenContext()).probs, logits.softmax(-1))


@pytest.mark.parametrize("name", LINEAR)
def test_dropouts_are_modules_whose_probability_is_what_is_applied(name):
    router = make(name, expert_dropout=0.5)
    x = torch.randn(50, D)
    assert (router(x, TRAINING).probs == 0).any()
    for module in router.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert torch.equal(router(x, TRAINING).probs, router(x, TokenContext()).probs)
    assert set(router.state_dict()) == {"weight"}


@pytest.mark.parametrize("name", LINEAR)
def test_a_router_that_perturbs_nothing_decides_in_training_as_in_evaluation(name):
    limits = {"capacity_factor": 0.3} if name == "capacity" else {}
    router = make(name, router_jitter_noise=0.5, expert_dropout=0.5, **limits)
    x = torch.randn(50, D)
    expected = router(x, TokenContext())
    assert not torch.equal(router(x, TRAINING).gate_matrix(), expected.gate_matrix())
    router.perturbs_training = False
    found = router(x, TRAINING)
    assert torch.equal(found.gate_matrix(), expected.gate_matrix()) and torch.equal(found.logits, expected.logits)
    assert found.context is TRAINING and found.dropped is None
    assert router.shared_rows(TRAINING) is router.weight


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("input_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", LINEAR)
def test_decisions_are_those_of_float32_whatever_dtype_the_weight_has_been_given(name, weight_dtype, input_dtype):
    torch.manual_seed(0)
    router = ROUTERS[name](64, 8, **({} if name == "dense" else {"top_k": 2}))
    router.weight.data = router.weight.data.to(weight_dtype)
    x = torch.randn(6144, 64).to(input_dtype)
    routing = router(x, TokenContext())
    expected = x.float() @ router.weight.float().T
    assert routing.logits.dtype == torch.float32 and torch.equal(routing.logits, expected)
    assert torch.equal(routing.probs.topk(2).indices, expected.topk(2).indices)


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


class Halves(Gate):
    def __call__(self, logits_TE, context):
        return logits_TE.sigmoid()


class OwnDecision(DenseRouter):
    def decide(self, logits_TE, context):
        return replace(super().decide(logits_TE, context), weights=logits_TE)


class Bare(Router):
    def forward(self, x, context):
        return Routing(weights=x[:, :1], experts=None, logits=x[:, :1], probs=x[:, :1], context=context)


@pytest.mark.parametrize(
    "router", [LinearRouter(D, 1, select=Dense(), gate=Halves()), OwnDecision(D, 1), Bare(D, 1)], ids=repr
)
def test_a_single_expert_is_mergeable_only_where_its_weight_is_constant(router):
    x = torch.randn(5, D)
    assert router(x, TokenContext()).weights.unique().numel() > 1 and not router.mergeable


class OwnScores(TopKRouter):
    def scores(self, x, context):
        return -super().scores(x, context)


def test_a_router_with_scores_of_its_own_lends_no_rows():
    assert OwnScores(D, E, top_k=2).shared_rows(TokenContext()) is None
    assert Bare(D, E).shared_rows(TokenContext()) is None
    assert TopKRouter(D, E, top_k=2).shared_rows(TokenContext()) is not None


def test_what_is_missing_of_a_router_is_named():
    with pytest.raises(NotImplementedError, match="Router has neither scores nor a forward"):
        Router(D, E)(torch.randn(2, D), TokenContext())
    with pytest.raises(NotImplementedError, match="LinearRouter has neither a selector nor a decision"):
        LinearRouter(D, E)(torch.randn(2, D), TokenContext())


class Follows(Selector):
    """Takes the first expert, and later ones less: not causal."""

    causal = False
    gives = frozenset({"order"})
    context_needs = frozenset({"prompt"})
    extra_scores = 2

    def tensors(self, num_experts):
        return {"bias": torch.zeros(num_experts)}

    def __call__(self, logits_TE, probs_TE, context, num_experts, *, bias):
        assert logits_TE.shape[1] == num_experts + 2 and probs_TE.shape[1] == num_experts
        return Routing(weights=probs_TE + bias, experts=None, logits=logits_TE, probs=probs_TE, context=context)


def test_a_router_makes_the_promises_of_its_parts_and_keeps_their_tensors():
    router = LinearRouter(D, E, select=Follows())
    assert not router.causal and router.batch_invariant and router.decode_stateless
    assert router.gives == {"order", "extra_scores"} and router.context_needs == {"prompt"}
    assert router.frozen == ("bias",) and not router.bias.requires_grad and router.weight.shape == (E + 2, D)
    assert set(router.state_dict()) == {"weight", "bias"}
    routing = router(torch.randn(3, D), TokenContext())
    assert routing.num_experts == E and routing.probs.shape == (3, E)


class Short(LinearRouter):
    def scores(self, x, context):
        return super().scores(x, context)[:, : E // 2]


@pytest.mark.parametrize("num_tokens", [1, 13])
def test_a_scorer_of_another_number_of_experts_is_told_so_and_never_spread_over_them(num_tokens):
    router = Short(D, E, select=Dense())
    x = torch.randn(num_tokens, D)
    assert router.gates(x, TokenContext()) is None
    with pytest.raises(ValueError, match=r"Short.scores gave 2 columns, where .* num_scores=4"):
        router(x, TokenContext())
