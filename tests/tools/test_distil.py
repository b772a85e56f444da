"""A distilled LoRA is the adapter where one equals it; elsewhere its error is measured, falls, and is told."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model

from moe_peft import MovConfig, PerftConfig, RoutedConfig
from moe_peft.tools import distil_to_lora
from tests.contract.cases import randomize, tiny_olmoe
from tests.tiny import padded_batch, tiny_llama
from tests.tools.exported import logits

BATCHES = [padded_batch([9, 6], seed=seed) for seed in range(2)]


def adapted(**fields):
    settings = {"router": "dense", "num_experts": 3, "r": 2, "target_modules": ["q_proj", "up_proj"]}
    model = get_peft_model(tiny_llama(), RoutedConfig(task_type="CAUSAL_LM", **{**settings, **fields}))
    randomize(model)
    return model


@pytest.mark.parametrize("fields", [{}, {"router_scope": "block", "target_modules": ["q_proj", "k_proj"]}])
def test_constant_routing_of_full_rank_loses_nothing(fields, tmp_path):
    model = adapted(scorer="layer_logits", **fields)
    found = distil_to_lora(model, tmp_path / "lora", BATCHES, fresh_base=tiny_llama, rank=6)
    assert max(found.lost.values()) < 1e-6 and found.difference.divergence < 1e-6
    stock = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")
    torch.testing.assert_close(logits(stock), logits(model), rtol=0, atol=1e-5)


def test_the_error_of_token_routing_falls_in_training_and_stands_in_the_card(tmp_path):
    model = adapted()
    before = {name: own.clone() for name, own in model.state_dict().items()}
    settings = {"fresh_base": tiny_llama, "rank": 2, "steps": 12, "learning_rate": 1e-2}
    found = distil_to_lora(model, tmp_path / "lora", BATCHES, **settings)
    assert 0 < found.difference.divergence < found.start.divergence
    card = (tmp_path / "lora/README.md").read_text()
    assert f"{found.difference.divergence:.4g}" in card and f"{found.difference.loss_after:.4g}" in card
    assert "rank 2" in str(found) and model.training
    assert all(torch.equal(own, before[name]) for name, own in model.state_dict().items())
    stock = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")
    assert stock.peft_config["default"].r == 2


def test_the_rank_is_the_smallest_that_loses_no_more_than_is_allowed(tmp_path):
    model = adapted(scorer="layer_logits")
    found = distil_to_lora(model, tmp_path / "some", BATCHES, fresh_base=tiny_llama, max_lost=0.3)
    smaller = distil_to_lora(model, tmp_path / "less", BATCHES, fresh_base=tiny_llama, rank=found.rank - 1)
    assert max(found.lost.values()) <= 0.3 < max(smaller.lost.values()) and 1 < found.rank <= 6


@pytest.mark.parametrize(
    ("build", "config"),
    [
        (tiny_llama, MovConfig()),
        (tiny_llama, RoutedConfig(experts="bottleneck")),
        (tiny_olmoe, PerftConfig(variant="R")),
    ],
)
def test_what_no_lora_comes_near_and_numbers_that_cannot_be_are_refused(build, config, tmp_path):
    model = get_peft_model(build(), config)
    with pytest.raises(ValueError, match="no sum of matrices beside a linear layer"):
        distil_to_lora(model, tmp_path / "lora", BATCHES, fresh_base=build)
    for fields, message in (({"rank": 0}, "rank=0"), ({"steps": -1}, "steps=-1"), ({"max_lost": 1.0}, "max_lost")):
        with pytest.raises(ValueError, match=message):
            distil_to_lora(adapted(), tmp_path / "lora", BATCHES, fresh_base=tiny_llama, **fields)
    assert not any(tmp_path.iterdir())
