"""One score for each expert at a place: the same for every token, so that the adapter merges exactly."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from moe_peft import RoutedConfig
from moe_peft.routers import Dense
from moe_peft.routers.layer_logits import LayerLogits
from moe_peft.types import TokenContext
from tests.compare import assert_same
from tests.contract.cases import randomize
from tests.tiny import padded_batch, tiny_llama

from .made import D, E, T


def test_every_token_has_the_scores_of_the_place():
    made = LayerLogits(D, E, select=Dense(), init_std=1.0).double()
    expected = made.weight.softmax(-1)[None].repeat(T, 1)
    assert_same(made(torch.randn(T, D).double(), TokenContext()).weights, expected, [made.weight], [made.weight])
    assert LayerLogits(D, E, select=Dense()).weight.abs().max() < 0.01


@pytest.mark.parametrize(
    ("router", "gate", "args"),
    [
        ("dense", "softmax", {}),
        ("top_k", "sigmoid", {}),
        ("dense", "gumbel", {"hard": True}),
        ("top_p", "softmax", {}),
    ],
)
def test_the_merged_model_equals_the_adapted_one(router, gate, args):
    config = RoutedConfig(
        scorer="layer_logits", router=router, gate=gate, router_args=args, num_experts=3, r=2, task_type="CAUSAL_LM"
    )
    model, batch = get_peft_model(tiny_llama(), config).double().eval(), padded_batch([5, 3])
    randomize(model)
    with torch.no_grad():
        before = model(**batch).logits
        torch.testing.assert_close(model.merge_and_unload()(**batch).logits, before, rtol=1e-9, atol=1e-9)


def test_selectors_that_may_leave_a_place_without_experts_are_refused():
    with pytest.raises(ValueError, match="router='null_top_k' must be one that needs no extra_scores"):
        RoutedConfig(scorer="layer_logits", router="null_top_k")
