"""Which experts each token uses is what the routers decided in that forward pass."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

import moe_peft
from moe_peft.routers import backbone_routing
from moe_peft.tools.tokens import _matrix, token_routing
from moe_peft.types import TokenContext
from tests.contract.cases import tiny_olmoe
from tests.tiny import tiny_llama
from tests.train.tiny_run import make_tokenizer


def test_the_weights_are_those_of_the_routers():
    config = moe_peft.RoutedConfig(task_type="CAUSAL_LM", num_experts=4, top_k=2)
    model = get_peft_model(tiny_llama(), config).eval()
    found = token_routing(model, make_tokenizer(), "w7 w8 w9")
    assert found.tokens == ["w7", "w8", "w9"]
    with torch.no_grad(), moe_peft.telemetry.record(model) as routings:
        model(input_ids=torch.tensor([[7, 8, 9]]))
    assert set(found.weights) == set(routings)
    for place, (routing,) in routings.items():
        assert torch.equal(found.weights[place], routing.gate_matrix())
        for token, pairs in enumerate(found.top(place, 4)):
            assert dict(pairs) == pytest.approx(
                dict(zip(routing.experts[token].tolist(), routing.weights[token].tolist(), strict=True))
            )


def test_experts_of_the_backbone_are_those_that_it_chose():
    model = get_peft_model(tiny_olmoe(), moe_peft.PerftConfig(task_type="CAUSAL_LM", variant="E"))
    found = token_routing(model, make_tokenizer(), "w7 w8 w9")
    assert [len(pairs) for pairs in found.top("model.layers.1.mlp.experts", 4)] == [2, 2, 2]


def test_a_disabled_adapter_and_a_text_without_tokens_are_refused():
    model = get_peft_model(tiny_llama(), moe_peft.RoutedConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="The text has no tokens"):
        token_routing(model, make_tokenizer(), "")
    model.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match="Nothing was routed"):
        token_routing(model, make_tokenizer(), "w7")


def test_a_routing_that_is_not_finite_is_refused():
    routing = backbone_routing(torch.tensor([[0, 1]]), torch.tensor([[float("nan"), 1.0]]), 2, TokenContext())
    with pytest.raises(ValueError, match="weights of the experts are not finite"):
        _matrix(routing)
