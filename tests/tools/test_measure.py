"""What two models say about the same tokens is compared over all of them, padding left out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from moe_peft.tools.measure import Comparison, checked_batches, evaluating, labels_of, next_tokens
from tests.tiny import padded_batch, tiny_llama


def test_losses_divergence_and_agreement_are_means_over_tokens():
    one, other, batches = tiny_llama(), tiny_llama(seed=1), [padded_batch([7, 4]), padded_batch([3, 3], seed=2)]
    found = Comparison()
    logs = []
    for batch in batches:
        own = [next_tokens(model, batch) for model in (one, other)]
        found.add(own[0][0], own[1][0], own[0][1])
        logs.append((own[0][0], own[1][0], own[0][1]))
    before, after, labels = (torch.cat(parts).double() for parts in zip(*logs, strict=True))
    result = found.result()
    assert len(labels) == 6 + 3 + 2 + 2
    assert result.loss_before == pytest.approx(float(F.nll_loss(before, labels.long())), abs=1e-6)
    assert result.loss_after == pytest.approx(float(F.nll_loss(after, labels.long())), abs=1e-6)
    divergence = F.kl_div(after, before, reduction="batchmean", log_target=True)
    assert result.divergence == pytest.approx(float(divergence), abs=1e-6)
    assert result.agreement == pytest.approx(float((before.argmax(-1) == after.argmax(-1)).double().mean()))
    assert set(result.metrics()) >= {"perplexity_before", "agreement"} and "nats" in str(result)


def test_labels_of_a_batch_count_where_it_has_them_and_no_padding():
    batch = padded_batch([3, 2])
    assert labels_of(batch)[1].tolist()[2:] == [-100]
    own = {**batch, "labels": torch.full_like(batch["input_ids"], -100)}
    assert len(next_tokens(tiny_llama(), own)[1]) == 0
    with pytest.raises(ValueError, match="no token with a label"):
        Comparison().result()


def test_a_model_is_evaluated_and_trained_as_before_also_after_an_error():
    model = tiny_llama().train()
    with pytest.raises(KeyError), evaluating(model):
        assert not model.training
        raise KeyError
    assert model.training
    for batches in ([], [{}], ["text"]):
        with pytest.raises(ValueError, match="one or more dicts with input_ids"):
            checked_batches(batches, "tool")


def test_a_token_that_both_models_rule_out_adds_nothing_and_nan_is_refused():
    logs = torch.tensor([[0.5, 0.5, 0.0]]).log()
    comparison = Comparison()
    comparison.add(logs, logs, torch.tensor([0]))
    assert comparison.result().divergence == 0 and comparison.result().agreement == 1

    class Broken(torch.nn.Module):
        def forward(self, input_ids):
            return SimpleNamespace(logits=torch.full((*input_ids.shape, 3), float("nan")))

    with pytest.raises(ValueError, match="probabilities of the Broken are not finite"):
        next_tokens(Broken(), {"input_ids": torch.tensor([[1, 2]])})
