"""Token-wise and sample-wise routing mixed: probabilities are those of the formula, and shares start by the layer."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from moe_peft import RoutedConfig, routed_layers
from moe_peft.routers import Dense
from moe_peft.routers.hybrid import Hybrid
from tests.compare import assert_same
from tests.tiny import LAYERS, tiny_llama

from .made import D, E, T
from .test_prompt_mean import KNOWN, OWNER


def made(**settings):
    torch.manual_seed(0)
    router = Hybrid(D, E, select=Dense(), **settings).double()
    return router, torch.randn(T, D, dtype=torch.float64, requires_grad=True)


def test_equals_the_mixture_of_both():
    router, x = made(mu=0.4)
    share = router.alpha.sigmoid()
    means = router.mean(x, OWNER, KNOWN)
    samples = (means @ router.prompt_weight.T).softmax(-1)[OWNER]
    expected = (1 - share) * (x @ router.weight.T).softmax(-1) + share * samples
    leaves = [x, *router.parameters()]
    assert_same(router(x, KNOWN).probs, expected, leaves, leaves, tolerance=1e-10)


@pytest.mark.parametrize(("alpha", "wholly"), [(-60.0, "token"), (60.0, "sample")])
def test_extreme_shares_leave_one_of_both(alpha, wholly):
    router, x = made(mu=alpha)
    probs = router(x, KNOWN).probs
    if wholly == "token":
        torch.testing.assert_close(probs, (x @ router.weight.T).softmax(-1))
    else:
        assert all(torch.allclose(probs[s == OWNER], probs[s == OWNER][:1]) for s in range(3))


def test_deeper_layers_start_with_a_larger_share_of_the_sample():
    config = RoutedConfig(
        scorer="hybrid", num_experts=3, router_args={"mu": 0.5, "eps": 2.0}, target_modules=["up_proj"]
    )
    layers = routed_layers(get_peft_model(tiny_llama(), config))
    found = [layer.router["default"].alpha.item() for layer in layers]
    assert found == pytest.approx([2.0 * (2 * (index + 1) / LAYERS - 1) + 0.5 for index in range(LAYERS)])
