"""A researcher's parts compute what their first lines say: references in float64, a token and an expert at a time."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from moe_peft import RoutedConfig, after_step, routed_layers
from moe_peft.extend import GATES, SELECTORS, ConstantRouter, LinearRouter, RoutingStatistics, TokenContext
from moe_peft.forward.joined_losses import LayerLosses, finish
from tests.compare import assert_same, random_routing
from tests.contract.cases import randomize
from tests.tiny import padded_batch, tiny_llama

from . import registered
from .activation_norm import ActivationNorm
from .biased_top_k import BiasedTopK
from .cp_diagonal import CpDiagonal
from .null_experts import NullLoadBalancing, NullTopK
from .relu_router import ActiveL1, Positive, Relu
from .task_table import TaskTable

D, E, T = 7, 4, 13


def router(select, gate=None):
    torch.manual_seed(0)
    made = LinearRouter(D, E, select=select, gate=gate).double()
    return made, torch.randn(T, D, dtype=torch.float64)


def test_relu_routing_uses_what_scores_above_zero_and_its_loss_is_share_times_mean_weight():
    made, x = router(Positive(), Relu())
    routing = made(x, TokenContext())
    z = x @ made.weight.T
    used, loss = (z > 0).double(), 0.0
    assert torch.equal(routing.request_matrix(), used)
    for e in range(E):
        loss = loss + E / (2 * T) * used[:, e].sum() * z[:, e].relu().mean()
    assert_same(ActiveL1(active=2)(routing), loss, [made.weight], [made.weight])
    statistics = RoutingStatistics.of(routing)
    torch.testing.assert_close(statistics.load, used.sum(0) / used.sum())


@pytest.mark.parametrize(("active", "factor"), [(0.1, 1.2), (3.9, 1 / 1.2)])
def test_the_weight_of_the_loss_grows_while_more_experts_are_active_than_wanted(active, factor):
    made, x = router(Positive(), Relu())
    statistics = [RoutingStatistics.of(made(x, TokenContext()))] * 2
    assert ActiveL1(active=active).adapt(0.5, statistics) == pytest.approx(0.5 * factor)


def test_after_a_step_every_place_has_the_adapted_weight():
    with registered():
        losses = {"active_l1": 0.5}
        config = RoutedConfig(router="positive", gate="relu", router_aux_loss_coef=0.0, losses=losses, num_experts=E)
        model = get_peft_model(tiny_llama(), config).train()
    batch = padded_batch([5, 3])
    model(**batch, labels=batch["input_ids"]).loss.backward()
    after_step(model)
    weights = {layer.objectives["default"].coefficients["active_l1"] for layer in routed_layers(model)}
    assert len(weights) == 1 and weights <= {0.5 * 1.2, 0.5 / 1.2}


@pytest.mark.parametrize("normalise", [False, True])
def test_null_experts_take_slots_and_weigh_nothing(normalise):
    made, x = router(NullTopK(top_k=3, num_null=2, norm_topk_prob=normalise))
    routing, probs = made(x, TokenContext()), (x @ made.weight.T).softmax(-1)
    assert made.weight.shape == (E + 2, D) and routing.probs.shape == (T, E)
    for t in range(T):
        real = [e for e in probs[t].topk(3).indices.tolist() if e < E]
        total = sum(probs[t, e] for e in real) if normalise else 1.0
        expected = torch.stack([probs[t, e] / total if e in real else torch.zeros(()).double() for e in range(E)])
        torch.testing.assert_close(routing.gate_matrix()[t], expected)


def test_balance_with_null_experts_equals_the_direct_definition():
    made, x = router(NullTopK(top_k=3, num_null=2))
    routing, probs = made(x, TokenContext()), (x @ made.weight.T).softmax(-1)
    chosen = torch.zeros(T, E + 2).double().scatter(1, probs.topk(3).indices, 1.0)
    shares = chosen.sum(0) / (3 * T)
    shares[E:] = shares[E:].mean()
    expected = (E + 2) * (shares.detach() * probs.mean(0)).sum()
    assert_same(NullLoadBalancing()(routing), expected, [made.weight], [made.weight])


@pytest.mark.parametrize("loss", [ActiveL1(), NullLoadBalancing()], ids=lambda own: type(own).__name__)
def test_losses_of_ones_own_join_over_batches(loss):
    select, gate = (Positive(), Relu()) if isinstance(loss, ActiveL1) else (NullTopK(top_k=2), None)
    made, x = router(select, gate)
    parts = [loss.sums(made(own, TokenContext())).detach() for own in (x[:5], x[5:])]
    torch.testing.assert_close(loss.value(parts[0] + parts[1]), loss(made(x, TokenContext())).detach())
    layer = LayerLosses({"own": loss}, {"own": 0.5}, "micro_batch", {"own": parts[0]})
    finish({("place", "default", 0): layer}, None)
    leaf = parts[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(0.5 * loss.value(leaf), leaf)
    torch.testing.assert_close(layer.gradients["own"], expected)


def test_a_bias_joins_the_choice_alone_and_moves_against_the_load():
    made, x = router(BiasedTopK(top_k=2, rate=0.25))
    made.bias.data = torch.tensor([0.0, 0.9, 0.0, -0.9]).double()
    routing, probs = made(x, TokenContext()), (x @ made.weight.T).softmax(-1)
    for t in range(T):
        chosen = sorted(range(E), key=lambda e, t=t: -float((probs[t, e] + made.bias[e]).detach()))[:2]
        expected = torch.stack([probs[t, e] if e in chosen else probs[t, e] * 0 for e in range(E)])
        torch.testing.assert_close(routing.gate_matrix()[t], expected)
    load, before = routing.request_matrix().mean(0) / 2, made.bias.clone()
    made.after_step(RoutingStatistics.of(routing))
    torch.testing.assert_close(made.bias - before, 0.25 * (1 / E - load).sign())
    assert not made.bias.requires_grad and "bias" in made.state_dict()


def test_the_norm_of_what_each_expert_makes_of_the_input_is_its_score():
    with registered():
        config = RoutedConfig(scorer="activation_norm", num_experts=E, r=3, target_modules=["q_proj"])
        model = get_peft_model(tiny_llama(), config).double().eval()
        randomize(model)
    layer = routed_layers(model)[0]
    bank, x, out = layer.experts["default"], torch.randn(T, 32).double(), torch.randn(T, 32).double()
    z = torch.stack([(x @ bank.A[e].T).norm(dim=-1) for e in range(E)], -1)
    weights, chosen = z.softmax(-1).topk(2)
    expected = out.clone()
    for t in range(T):
        for w, e in zip(weights[t], chosen[t], strict=True):
            expected[t] = expected[t] + config.scaling * w * (x[t] @ bank.A[e].T @ bank.B[e])
    found = layer.add("default", x, out, TokenContext())
    assert_same(found, expected, [bank.A, bank.B], [bank.A, bank.B])
    assert isinstance(layer.router["default"], ActivationNorm) and not list(layer.router["default"].parameters())


def test_a_router_that_needs_activations_is_refused_where_the_experts_have_none():
    with registered(), pytest.raises(ValueError, match="scorer='activation_norm' must be one that needs no activat"):
        RoutedConfig(scorer="activation_norm", experts="cp_diagonal")


def test_experts_of_a_diagonal_equal_their_matrices_and_merge_under_constant_weights():
    torch.manual_seed(0)
    bank = CpDiagonal(D, 5, num_experts=E, r=3, scaling=1.7, init_weights=False).double()
    x, base, routing = torch.randn(T, D).double(), torch.randn(T, 5).double(), random_routing(T, E, 2)
    expected = base
    for e in range(E):
        matrix = bank.B.T @ torch.diag(bank.c[e]) @ bank.A
        expected = expected + 1.7 * routing.gate_matrix()[:, e : e + 1] * (x @ matrix.T)
    leaves = [bank.A, bank.B, bank.c, routing.logits]
    assert_same(bank(x, base, routing), expected, leaves, leaves, tolerance=1e-11)
    with registered():
        model = get_peft_model(
            tiny_llama(), RoutedConfig(router="constant", experts="cp_diagonal", num_experts=E, r=2)
        ).eval()
    randomize(model)
    batch = padded_batch([5, 3])
    with torch.no_grad():
        before = model(**batch).logits
        torch.testing.assert_close(model.merge_and_unload()(**batch).logits, before, rtol=1e-4, atol=1e-4)


def test_a_task_table_gives_a_sample_the_row_of_its_task():
    torch.manual_seed(0)
    made = TaskTable(D, E, select=SELECTORS["dense"](), gate=GATES["softmax"](), num_tasks=3)
    context = TokenContext(sequences=torch.tensor([0, 0, 1]), num_sequences=2, groups=torch.tensor([2, 0]))
    probs = made(torch.randn(3, D), context).probs
    torch.testing.assert_close(probs, made.weight.softmax(-1)[[2, 2, 0]])
    with pytest.raises(ValueError, match="has 3 tasks, but a sample is of task 5"):
        made(torch.randn(3, D), TokenContext(groups=torch.tensor([5])))
    with pytest.raises(ValueError, match="needs the task of every sample"):
        made(torch.randn(3, D), TokenContext())


def test_a_constant_router_asks_for_every_expert():
    assert ConstantRouter(D, E)(torch.randn(3, D), TokenContext()).request_matrix().all()
