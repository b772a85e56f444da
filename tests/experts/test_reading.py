"""Decisions by what experts make of the input are those of float32, whatever dtype everything has been given."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from moe_peft import RoutedConfig
from moe_peft.experts import EXPERTS
from moe_peft.routers import SCORERS
from moe_peft.telemetry.functions import record
from tests.tiny import OneLinear

READERS = {name: cls for name, cls in SCORERS.items() if cls.reads == "activations"}
PAIRS = [
    (kind, scorer)
    for kind, bank in EXPERTS.items()
    for scorer, cls in READERS.items()
    if cls.needs <= bank.gives and bank.placement is None
]


def model_of(kind: str, scorer: str) -> torch.nn.Module:
    fields = {"experts": kind, "scorer": scorer, "num_experts": 8, "r": 4, "top_k": 2, "lora_dropout": 0.5}
    torch.manual_seed(0)
    config = RoutedConfig(target_modules={"linear"}, init_weights=False, **fields)
    return get_peft_model(OneLinear(64, 5).float(), config).eval()


def decisions(model: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad(), record(model) as seen:
        model(x=x)
    ((routing,),) = seen.values()
    return routing.logits, routing.probs.topk(2).indices


def test_kinds_and_routers_that_go_together_are_tried():
    assert {scorer for _, scorer in PAIRS} == set(READERS) and len({kind for kind, _ in PAIRS}) > 3


@pytest.mark.parametrize(("kind", "scorer"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decisions_by_activations_are_those_of_float32(kind, scorer, dtype):
    model = model_of(kind, scorer)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    x = torch.randn(6144, 64).to(dtype)
    logits, chosen = decisions(model, x)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    expected, right = decisions(model, x.float())
    assert logits.dtype == torch.float32 and torch.equal(chosen, right)
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize(("kind", "scorer"), PAIRS)
def test_autocast_rounds_neither_the_input_nor_the_activations_of_a_decision(kind, scorer):
    model, x = model_of(kind, scorer), torch.randn(6144, 64)
    expected, right = decisions(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        logits, chosen = decisions(model, x)
    assert torch.equal(chosen, right)
    torch.testing.assert_close(logits, expected)
