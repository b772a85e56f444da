"""Slots that no expert serves count nowhere, and padding does not even where its weights are not finite."""

from __future__ import annotations

import pytest
import torch

from moe_peft.place import MoeLayer
from moe_peft.selection.tally import ExpertTally, ScoredTokens, scored_tokens

LAYER = MoeLayer(3, "experts", None, None, (), num_experts=4, in_features=1, out_features=1)


def tally_of(index, weights, counts, samples):
    tally = ExpertTally([LAYER])
    tokens = ScoredTokens(torch.tensor(counts), torch.tensor(samples), max(samples) + 1)
    tally.add(3, torch.tensor(index), torch.tensor(weights, dtype=torch.float64), tokens)
    tally.add_tokens(tokens)
    return tally


def test_slots_of_weight_zero_and_slots_without_an_expert_do_not_count():
    tally = tally_of([[0, 1], [2, 4], [1, 3]], [[0.75, 0.25], [0.5, 0.5], [1.0, 0.0]], [True] * 3, [0, 0, 1])
    scores = tally.scores(3, 5)
    assert scores.values["token", "token"].tolist() == [1 / 6, 2 / 6, 1 / 6, 0.0]
    assert scores.values["gate", "token"].tolist() == [0.25, 1.25 / 3, 0.5 / 3, 0.0]
    # Two samples of two tokens and of one.
    assert scores.values["token", "sample"].tolist() == [0.125, 0.375, 0.125, 0.0]
    assert scores.values["gate", "sample"].tolist() == [0.1875, (0.125 + 1) / 2, 0.125, 0.0]
    assert (scores.top_k, scores.expert_parameters, tally.num_samples) == (2, 5, 2)


def test_padding_may_hold_anything_but_tokens_that_count_must_be_finite():
    index, weights = [[0, 1], [1, 2]], [[0.75, 0.25], [torch.nan, torch.inf]]
    tally = tally_of(index, weights, [True, False], [0, 0])
    assert tally.scores(3, 1).values["gate", "token"].tolist() == [0.75, 0.25, 0.0, 0.0]
    with pytest.raises(ValueError, match="routing weights of layer 3 are not finite"):
        tally_of(index, weights, [True, True], [0, 0])


def test_samples_are_rows_or_documents_and_those_without_a_scored_token_are_none():
    ids = torch.zeros(2, 4, dtype=torch.long)
    rows = scored_tokens({"input_ids": ids, "attention_mask": torch.tensor([[0, 1, 1, 1], [0] * 4])}, "all", None)
    assert rows.lengths.tolist() == [3, 0]
    tally = ExpertTally([LAYER])
    tally.add_tokens(rows)
    assert (tally.num_tokens, tally.num_samples) == (3, 1)
    positions = torch.tensor([[0, 1, 0, 0], [0, 1, 2, 3]])
    assert scored_tokens({"input_ids": ids, "position_ids": positions}, "all", 6).lengths.tolist() == [2, 1, 1, 2]
