"""The bank of low-rank experts: the formula, its initialisation, dropout and the merged matrix."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from moe_peft.experts import LowRankExperts, PendingRouting
from moe_peft.ops import IMPLEMENTATIONS
from moe_peft.routers import ConstantRouter, DenseRouter
from moe_peft.types import TokenContext
from tests import reference
from tests.compare import assert_same, gates_of, random_routing

D, OUT, E, R = 7, 5, 4, 3


def bank(num_experts=E, **kwargs):
    torch.manual_seed(0)
    kwargs = {"scaling": 1.7, "init_weights": False, **kwargs}
    return LowRankExperts(D, OUT, num_experts=num_experts, r=R, **kwargs).double()


def inputs(num_tokens):
    torch.manual_seed(1)
    x = torch.randn(num_tokens, D, dtype=torch.float64, requires_grad=True)
    return x, torch.randn(OUT, D, dtype=torch.float64)


@pytest.mark.parametrize("implementation", ["eager", "dense"])
@pytest.mark.parametrize("num_tokens", [0, 1, 13])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, None), (E, None), (E, 2)])
def test_equals_the_formula(implementation, num_tokens, num_experts, top_k):
    experts = bank(num_experts, experts_implementation=implementation)
    x, W0 = inputs(num_tokens)
    routing = random_routing(num_tokens, num_experts, top_k)
    actual = experts(x, x @ W0.T, routing)
    expected = reference.routed_layer(x, W0, experts.A, experts.B.mT, gates_of(routing), scaling=1.7)
    leaves = [x, experts.A, experts.B, routing.logits]
    assert_same(actual, expected, leaves, leaves)


@pytest.mark.parametrize("in_place", [False, True])
def test_prepare_and_combine_equal_the_whole(in_place):
    experts = bank()
    x, W0 = inputs(13)
    routing = random_routing(13, E, 2)
    h = experts.prepare(x, routing.context)
    torch.testing.assert_close(experts.activations(h), torch.einsum("td,erd->ter", x, experts.A))
    actual = experts.combine(h, x @ W0.T, routing, in_place=in_place)
    leaves = [x, experts.A, experts.B, routing.logits]
    assert_same(actual, experts(x, x @ W0.T, routing), leaves, leaves)


def test_rows_that_a_shared_gemm_takes_are_those_that_prepare_applies():
    experts = bank()
    x, _ = inputs(13)
    torch.testing.assert_close(x @ experts.shared_rows(TokenContext()).T, experts.prepare(x, TokenContext()))


@pytest.mark.parametrize("implementation", ["eager", "dense"])
def test_a_decision_by_the_activations_is_asked_for_once_with_all_of_them(implementation):
    experts = bank(experts_implementation=implementation)
    x, W0 = inputs(13)
    seen, routing = [], random_routing(13, E, 2)

    def decide(activations):
        seen.append(activations)
        return routing

    actual = experts(x, x @ W0.T, PendingRouting(routing.context, decide))
    (activations,) = seen
    torch.testing.assert_close(activations, torch.einsum("td,erd->ter", x, experts.A))
    leaves = [x, experts.A, experts.B, routing.logits]
    assert_same(actual, experts(x, x @ W0.T, routing), leaves, leaves)


def test_dropout_is_a_module_whose_probability_is_what_is_applied():
    experts = bank(lora_dropout=0.5)
    x, W0 = inputs(13)
    training = TokenContext(training=True)
    assert experts.shared_rows(training) is None and experts.shared_rows(TokenContext()) is not None
    for module in experts.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    routing = random_routing(13, E, context=training)
    torch.testing.assert_close(experts(x, x @ W0.T, routing), bank()(x, x @ W0.T, routing))
    assert set(experts.state_dict()) == {"A", "B"} and experts.shared_rows(training) is not None


class Squared(LowRankExperts):
    def prepare(self, x_TD, context):
        return super().prepare(x_TD, context).square()


def test_a_kind_of_its_own_inherits_neither_the_promise_to_merge_nor_the_shared_gemm():
    experts = Squared(D, OUT, num_experts=E, r=R, scaling=1.0)
    assert LowRankExperts.mergeable and not experts.mergeable
    assert experts.shared_rows(TokenContext()) is None


def test_shapes_are_how_those_of_the_parameters_begin():
    begins = LowRankExperts.shapes(E, R)
    assert {name: tuple(p.shape[: len(begins[name])]) for name, p in bank().named_parameters()} == begins


@pytest.mark.parametrize("init_weights", [True, "gaussian"])
def test_fresh_bank_is_the_identity_bit_for_bit(init_weights):
    experts = bank(init_weights=init_weights)
    x, W0 = inputs(13)
    base = x @ W0.T
    assert torch.equal(experts(x, base, random_routing(13, E)), base)
    assert experts.A.abs().max() > 0


def test_uniform_initialisation_has_the_bound_of_linear_for_each_expert():
    torch.manual_seed(0)
    A = LowRankExperts(400, 8, num_experts=3, r=16, scaling=1.0).A
    assert A.abs().max() <= 400**-0.5 and A.abs().amax((1, 2)).min() > 0.99 * 400**-0.5


def test_gaussian_initialisation_has_a_standard_deviation_of_two_hundredths():
    torch.manual_seed(0)
    A = LowRankExperts(400, 8, num_experts=3, r=16, scaling=1.0, init_weights="gaussian").A
    assert abs(float(A.std()) - 0.02) < 0.001 and A.abs().max() > 0.06


def test_dropout_acts_in_training_with_one_mask_for_all_experts():
    experts = bank(lora_dropout=0.5)
    x, W0 = inputs(13)
    routing = random_routing(13, E, context=TokenContext(training=True))
    torch.manual_seed(3)
    actual = experts(x, x @ W0.T, routing)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    expected = bank()(dropped, x @ W0.T, routing)
    torch.testing.assert_close(actual, expected)
    assert not torch.allclose(actual, bank()(x, x @ W0.T, routing))


@pytest.mark.parametrize("weight", [1.0, 0.4])
@pytest.mark.parametrize("in_place", [False, True])
def test_all_experts_with_one_weight_are_one_pair_of_the_rank_of_all(weight, in_place):
    experts, router = bank(), ConstantRouter(D, E, routed_scaling_factor=weight)
    x, W0 = inputs(13)
    assert router.constant_weight == weight
    routing = router(x, TokenContext())
    actual = experts.add_all(x, x @ W0.T, weight, TokenContext(), in_place=in_place)
    leaves = [x, experts.A, experts.B]
    assert_same(actual, experts(x, x @ W0.T, routing), leaves, leaves)


def test_a_kind_or_a_router_of_its_own_decides():
    x, W0 = inputs(3)
    own = Squared(D, OUT, num_experts=E, r=R, scaling=1.0).double()
    assert own.add_all(x, x @ W0.T, 1.0, TokenContext()) is None
    assert bank(experts_implementation="eager").add_all(x, x @ W0.T, 1.0, TokenContext()) is None

    class Halved(ConstantRouter):
        def decide(self, logits_TE, context):
            raise NotImplementedError

    assert Halved(D, E).constant_weight is None and DenseRouter(D, E).constant_weight is None


def test_dropout_is_silent_outside_training():
    x, W0 = inputs(13)
    routing = random_routing(13, E)
    assert torch.equal(bank(lora_dropout=0.5)(x, x @ W0.T, routing), bank()(x, x @ W0.T, routing))


def test_mixture_of_outputs_is_the_mixture_of_delta_weights():
    experts = bank()
    x, W0 = inputs(1)
    routing = random_routing(1, E)
    weights = routing.weights[0]
    torch.testing.assert_close(experts(x, x @ W0.T, routing), x @ (W0 + experts.delta_weight(weights)).T)


def test_mixture_is_not_the_product_of_mixed_matrices():
    experts = bank()
    weights = random_routing(1, E).weights[0]
    mixed_A = torch.einsum("e,erd->rd", weights, experts.A)
    mixed_B = torch.einsum("e,ero->ro", weights, experts.B)
    product, mixture = 1.7 * mixed_B.T @ mixed_A, experts.delta_weight(weights)
    assert (product - mixture).norm() > 0.3 * mixture.norm()


def test_permuting_experts_and_gates_together_changes_nothing():
    experts = bank()
    x, W0 = inputs(13)
    routing = random_routing(13, E)
    order = torch.tensor([2, 0, 3, 1])
    permuted = bank()
    with torch.no_grad():
        permuted.A.copy_(experts.A[order])
        permuted.B.copy_(experts.B[order])
    shuffled = type(routing)(routing.weights[:, order], None, routing.logits[:, order], routing.probs[:, order])
    torch.testing.assert_close(permuted(x, x @ W0.T, shuffled), experts(x, x @ W0.T, routing))


@pytest.mark.parametrize("implementation", ["eager", "dense", "segment", "gather"])
@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("shared", [1, 2])
def test_shared_experts_have_weight_one_whatever_is_decided(implementation, top_k, shared):
    experts = bank(shared=shared, experts_implementation=implementation)
    assert experts.A.shape == (E + shared, R, D) and experts.num_choices == E
    x, W0 = inputs(13)
    routing = random_routing(13, E, top_k)
    if top_k is not None:
        routing.experts[3, 1] = E  # a slot without an expert is no shared one
        routing.weights.data[3, 1] = 0.0
    gates = [{**own, **{E + s: torch.ones(()).double() for s in range(shared)}} for own in gates_of(routing)]
    expected = reference.routed_layer(x, W0, experts.A, experts.B.mT, gates, scaling=1.7)
    leaves = [x, experts.A, experts.B]
    assert_same(experts(x, x @ W0.T, routing), expected, leaves, leaves)
    h = experts.prepare(x, routing.context)
    assert_same(experts.combine(h, x @ W0.T, routing), expected, leaves, leaves)
    assert experts.activations(h).shape == (13, E, R)


def test_a_shared_expert_beside_experts_of_no_weight_is_plain_lora():
    experts = bank(shared=1)
    x, W0 = inputs(13)
    nothing = torch.zeros(13, E).double()
    routing = type(random_routing(1, E))(weights=nothing, experts=None, logits=nothing, probs=nothing)
    lora = 1.7 * (x @ experts.A[E].T @ experts.B[E])
    torch.testing.assert_close(experts(x, x @ W0.T, routing), x @ W0.T + lora)
    weights = torch.arange(E).double()
    expected = 1.7 * sum(w * experts.B[e].T @ experts.A[e] for e, w in enumerate([*weights, 1.0]))
    torch.testing.assert_close(experts.delta_weight(weights), expected)
    assert LowRankExperts.saved_shapes(E, R, {"shared": 1}) == {"A": (E + 1, R), "B": (E + 1, R)}


class Doubled(LowRankExperts):
    """Adds twice the sum."""

    def combine(self, h, base_out_TO, routing, *, in_place=False):
        return base_out_TO + 2 * super().combine(h, torch.zeros_like(base_out_TO), routing)


class Tripled(LowRankExperts):
    """Reads three times its input."""

    def prepare(self, x_TD, context):
        return super().prepare(3 * x_TD, context)


class Noisy(LowRankExperts):
    """Drops in a way of its own."""

    def drop(self, x_TD, context):
        return 4 * x_TD if context.training else x_TD


@pytest.mark.parametrize("kind", [Doubled, Tripled, Noisy])
@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "auto"])
def test_what_a_kind_of_its_own_overrides_acts_under_every_implementation(implementation, top_k, kind):
    torch.manual_seed(0)
    made = kind(D, OUT, num_experts=E, r=R, scaling=1.0, init_weights=False, experts_implementation=implementation)
    made = made.double()
    plain = bank().double()
    plain.load_state_dict(made.state_dict())
    plain.scaling = 1.0
    x, W0 = inputs(13)
    base, routing = x @ W0.T, random_routing(13, E, top_k, context=TokenContext(training=True))
    factor = {Doubled: 2, Tripled: 3, Noisy: 4}[kind]
    expected = base + factor * (plain(x, base, routing) - base)
    torch.testing.assert_close(made(x, base, routing), expected)
