"""A researcher's parts compute what their first lines say, and are asked and refused as the package's own are."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from moe_peft import RoutedConfig, routed_layers
from moe_peft.extend import ConstantRouter, LinearRouter, TokenContext
from moe_peft.forward.joined_losses import LayerLosses, finish
from tests.compare import assert_same, random_routing
from tests.contract.cases import randomize
from tests.tiny import tiny_llama

from . import registered
from .avg_k import AvgK
from .cluster_variance import ClusterVariance
from .constants import Constants
from .prototypes import Prototypes
from .softplus import Softplus

D, E, T = 7, 4, 13


def router(select, gate=None):
    torch.manual_seed(0)
    made = LinearRouter(D, E, select=select, gate=gate).double()
    return made, torch.randn(T, D, dtype=torch.float64)


def test_a_selector_and_a_gate_keep_one_expert_of_each_group():
    made, x = router(Prototypes(num_groups=2), Softplus())
    routing, probs = made(x, TokenContext()), (1 + (x @ made.weight.T).exp()).log()
    expected = torch.zeros(T, E).double()
    for t in range(T):
        for group in ((0, 1), (2, 3)):
            best = max(group, key=lambda e: probs[t, e].item())
            expected[t, best] = probs[t, best]
    torch.testing.assert_close(routing.gate_matrix(), expected)
    assert made.num_slots == 2 and routing.experts.shape == (T, 2)


def test_options_are_asked_whether_they_fit_the_sizes():
    with registered(), pytest.raises(ValueError, match="router_args: num_groups=3 must divide num_experts=4"):
        RoutedConfig(router="prototypes", num_experts=4, router_args={"num_groups": 3})


def test_a_loss_of_ones_own_joins_over_batches():
    loss = ClusterVariance()
    made, x = router(Prototypes())
    parts = [loss.sums(made(own, TokenContext())).detach() for own in (x[:5], x[5:])]
    torch.testing.assert_close(loss.value(parts[0] + parts[1]), loss(made(x, TokenContext())).detach())
    layer = LayerLosses({"own": loss}, {"own": 0.5}, "micro_batch", {"own": parts[0]})
    finish({("place", "default", 0): layer}, None)
    leaf = parts[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(0.5 * loss.value(leaf), leaf)
    torch.testing.assert_close(layer.gradients["own"], expected)


def test_a_router_that_reads_activations_gets_those_of_each_expert():
    with registered():
        config = RoutedConfig(scorer="avg_k", num_experts=E, r=3, target_modules=["q_proj"])
        model = get_peft_model(tiny_llama(), config).double().eval()
    randomize(model)
    layer = routed_layers(model)[0]
    bank, x, out = layer.experts["default"], torch.randn(T, 32).double(), torch.randn(T, 32).double()
    weights, chosen = (x @ bank.A.mean(1).T).softmax(-1).topk(2)
    expected = out.clone()
    for t in range(T):
        for w, e in zip(weights[t], chosen[t], strict=True):
            expected[t] = expected[t] + config.scaling * w * (x[t] @ bank.A[e].T @ bank.B[e])
    found = layer.add("default", x, out, TokenContext())
    assert_same(found, expected, [bank.A, bank.B], [bank.A, bank.B])
    assert isinstance(layer.router["default"], AvgK) and not list(layer.router["default"].parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts": "constants"}, "scorer='avg_k' must be one that needs no activations, .*'low_rank', 'bottleneck'"),
        ({"router": "null_top_k"}, r"router='null_top_k' must be one that needs no extra_scores, .*'linear'"),
    ],
)
def test_parts_that_lack_what_they_need_are_refused_with_those_that_give_it(fields, message):
    with registered(), pytest.raises(ValueError, match=message):
        RoutedConfig(scorer="avg_k", **fields)


def test_experts_that_say_the_same_to_every_token():
    torch.manual_seed(0)
    bank = Constants(D, 5, num_experts=E, r=1, init_weights=False).double()
    x, base, routing = torch.randn(T, D).double(), torch.randn(T, 5).double(), random_routing(T, E, 2)
    expected = base + sum(routing.gate_matrix()[:, e : e + 1] * bank.v[e] for e in range(E))
    assert_same(bank(x, base, routing), expected, [bank.v, routing.logits], [bank.v, routing.logits])


def test_a_constant_router_asks_for_every_expert():
    assert ConstantRouter(D, E)(torch.randn(3, D), TokenContext()).request_matrix().all()
