"""One decision for a sample by its prompt: the formula, no look at the answer, and the same decision in decoding."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from torch.nn import functional as F

from moe_peft import RoutedConfig, routed_layers
from moe_peft.routers import Dense
from moe_peft.routers.prompt_mean import PromptMean
from moe_peft.types import TokenContext
from tests.compare import assert_same
from tests.contract.cases import randomize
from tests.tiny import padded_batch, tiny_llama

from .made import D, E, T

PROMPT = torch.tensor([True, True, False, True, True, True] + [False] * 7)
VALID = torch.tensor([True, True, True, False, True, True] + [True] * 6 + [False])
OWNER = torch.tensor([0] * 3 + [1] * 7 + [2] * 3)
KNOWN = TokenContext(valid=VALID, prompt=PROMPT, sequences=OWNER, num_sequences=3, num_rows=1)


def made():
    torch.manual_seed(0)
    return PromptMean(D, E, select=Dense()).double(), torch.randn(T, D, dtype=torch.float64, requires_grad=True)


def adapted(**fields):
    config = RoutedConfig(
        **{"task_type": "CAUSAL_LM", "scorer": "prompt_mean", "num_experts": 3, "top_k": 1, **fields}
    )
    model = get_peft_model(tiny_llama(), config).double().eval()
    randomize(model)
    return model


def test_equals_the_formula_over_the_valid_tokens_of_the_prompt():
    router, x = made()
    means = [x[[0, 1]].mean(0), x[[4, 5]].mean(0)]
    scores = [F.layer_norm(mean, (D,)) @ router.weight.T for mean in means] + [torch.zeros(E).double()]
    expected = torch.stack([scores[s] for s in OWNER.tolist()])
    leaves = [x, router.weight]
    assert_same(router(x, KNOWN).logits, expected, leaves, leaves)


def test_without_a_prompt_all_experts_are_used_alike():
    router, x = made()
    torch.testing.assert_close(router(x, KNOWN).probs[OWNER == 2], torch.full((3, E), 1 / E).double())


def test_no_answer_leaks_into_the_decision_of_a_training_pass():
    model, batch = adapted(), padded_batch([9, 7])
    labels = batch["input_ids"].masked_fill(torch.arange(9) < 4, -100)
    other = batch["input_ids"].clone()
    other[:, 6:] = (other[:, 6:] + 1) % 60 + 3
    before, after = (model(**{**batch, "input_ids": ids}, labels=labels).logits for ids in (batch["input_ids"], other))
    torch.testing.assert_close(after[:, :6], before[:, :6])
    assert not torch.allclose(after[:, 6:], before[:, 6:])


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_goes_on_with_the_decision_of_the_prompt(beams):
    model, batch = adapted(), padded_batch([6, 4], side="left")
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams}
    out = model.generate(**batch, **settings, output_logits=True, return_dict_in_generate=True)
    if beams > 1:
        assert out.sequences.shape == (2, 11)
        return
    mask = F.pad(batch["attention_mask"], (0, 5), value=1)
    labels = out.sequences.masked_fill(torch.arange(11) < 6, -100)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    whole = model(input_ids=out.sequences, attention_mask=mask, position_ids=positions, labels=labels).logits
    torch.testing.assert_close(torch.stack(out.logits, 1), whole[:, 5:-1].float(), rtol=1e-5, atol=1e-5)


def test_going_on_without_the_start_is_refused():
    router, x = made()
    with pytest.raises(ValueError, match="has seen none from their start"):
        router(x, TokenContext(cached=4, num_sequences=1))
    router(x, KNOWN)
    with pytest.raises(ValueError, match=r"goes on with 2 samples .* seen those of 3"):
        router(x[:2], TokenContext(cached=4, sequences=torch.arange(2), num_sequences=2))
    with pytest.raises(ValueError, match="slices of the rows"):
        router(x, TokenContext(part=4))


def test_samples_under_way_are_no_part_of_a_copy():
    layer = routed_layers(adapted())[0]
    router, (x, known) = layer.router["default"], (torch.randn(4, 32).double(), TokenContext())
    router(x, known)
    for copied in (copy.deepcopy(router), pickle.loads(pickle.dumps(router))):
        assert router._kept and not copied._kept
        assert torch.equal(copied(x, known).logits, router(x, known).logits)
