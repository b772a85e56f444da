"""The next token is chosen by what the strong routing has over the weak one, among tokens that it allows."""

from __future__ import annotations

import math

import pytest
import torch
from peft import get_peft_model
from transformers import LogitsProcessorList

import moe_peft
from moe_peft.tools import SelfContrast, expert_mask
from moe_peft.tools.self_contrast import contrast
from tests.tiny import padded_batch, tiny_llama


@pytest.fixture(scope="module")
def model():
    config = moe_peft.RoutedConfig(task_type="CAUSAL_LM", num_experts=4, init_weights=False, lora_alpha=64)
    return get_peft_model(tiny_llama(), config).eval()


def test_the_rule_token_by_token():
    strong = torch.tensor([[0.5, 0.3, 0.19, 0.01]]).log()
    weak = torch.tensor([[0.6, 0.1, 0.2, 0.1]]).log()
    found = contrast(strong, weak, 0.1, 0.5)
    expected = [1.5 * math.log(p) - 0.5 * math.log(q) for p, q in ((0.5, 0.6), (0.3, 0.1), (0.19, 0.2))]
    assert found[0, :3].tolist() == pytest.approx(expected, abs=1e-5)
    assert found[0, 3] == -math.inf  # less than a tenth of the largest


def test_greedy_decoding_equals_a_loop_of_two_forwards_with_padding(model):
    batch = padded_batch([5, 3], side="left")
    processor = SelfContrast(model, beta=2.0, alpha=0.01, attention_mask=batch["attention_mask"])
    found = model.generate(
        **batch,
        max_new_tokens=3,
        do_sample=False,
        logits_processor=LogitsProcessorList([processor]),
        eos_token_id=None,
    )
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(3):
        with torch.no_grad():
            positions = (mask.cumsum(-1) - 1).clamp_min(0)
            strong = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1].log_softmax(-1)
            with model.disable_adapter():
                weak = model(input_ids=ids, attention_mask=mask).logits[:, -1].log_softmax(-1)
        scores = 3.0 * strong - 2.0 * weak
        scores[strong < strong.amax(-1, keepdim=True) + math.log(0.01)] = -math.inf
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)
    assert torch.equal(found, ids)


def test_a_weak_routing_is_any_block(model):
    batch = padded_batch([5])
    processor = SelfContrast(model, lambda: expert_mask(model, off=[0, 1, 2]), beta=1.0)
    with torch.no_grad():
        scores = model(**batch).logits[:, -1]
        found = processor(batch["input_ids"], scores)
        with expert_mask(model, off=[0, 1, 2]):
            weak = model(**batch).logits[:, -1]
    torch.testing.assert_close(found, contrast(scores.log_softmax(-1), weak.log_softmax(-1), 0.1, 1.0))


@pytest.mark.parametrize("given", [{"alpha": 0}, {"alpha": 2}, {"alpha": True}, {"beta": -1}, {"beta": math.nan}])
def test_numbers_that_cannot_work_are_refused(model, given):
    with pytest.raises(ValueError, match=next(iter(given))):
        SelfContrast(model, **given)
    with pytest.raises(ValueError, match="is no PeftModel"):
        SelfContrast(tiny_llama())
