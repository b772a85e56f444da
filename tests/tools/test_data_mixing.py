"""Data that use experts of their own are drawn more often, and every set keeps a share."""

from __future__ import annotations

import math
from itertools import islice

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

import moe_peft
from moe_peft.tools import DynamicMixing, MixedData
from moe_peft.tools.data_mixing import next_weights
from tests.tiny import padded_batch, tiny_llama

ROWS = {
    name: [{"input_ids": [n, n + 1, n + 2], "labels": [n, n + 1, n + 2]}] for name, n in (("law", 5), ("code", 40))
}
BATCHES = {"law": [padded_batch([5, 4])], "code": [padded_batch([6, 2], seed=3)]}


def routed():
    config = moe_peft.RoutedConfig(task_type="CAUSAL_LM", num_experts=4, init_weights=False)
    return get_peft_model(tiny_llama(), config)


def test_the_rule_in_plain_sums():
    loads = [[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.0, 0.1, 0.9]]
    weights, eta, c = [0.5, 0.3, 0.2], 2.0, 0.1

    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.dist(a, [0] * 3) / math.dist(b, [0] * 3)

    apart = [sum(1 - cosine(a, b) for b in loads) / 3 for a in loads]
    raw = [w * math.exp(eta * d) for w, d in zip(weights, apart, strict=True)]
    expected = [(1 - c) * own / sum(raw) + c / 3 for own in raw]
    assert next_weights(weights, torch.tensor(loads), eta, c) == pytest.approx(expected)
    assert max(expected) == expected[2] or apart[2] == max(apart)


def test_rows_are_drawn_by_the_current_weights():
    data = MixedData({"a": ["a"], "b": ["b"]}, {"a": 3, "b": 1}, seed=1)
    rows = iter(data)
    assert sum(row == "a" for row in islice(rows, 400)) == pytest.approx(300, abs=40)
    data.weights = {"a": 0.01, "b": 0.99}
    assert sum(row == "a" for row in islice(rows, 400)) < 20
    assert list(islice(iter(data), 5)) == list(islice(iter(data), 5))


def test_a_trainer_measures_and_draws_anew(tmp_path):
    data = MixedData(ROWS)
    mixing = DynamicMixing(data, BATCHES, steps=2)
    args = TrainingArguments(
        str(tmp_path), max_steps=4, use_cpu=True, report_to=[], save_strategy="no", per_device_train_batch_size=2
    )
    trainer = Trainer(routed(), args, train_dataset=data, callbacks=[mixing])
    trainer.train()
    assert list(mixing.history) == [2, 4] and trainer.model.training
    assert data.weights == mixing.history[4] and sum(data.weights.values()) == pytest.approx(1)
    assert min(data.weights.values()) >= 0.05 / 2


def test_what_cannot_be_mixed_is_refused():
    for given, message in (
        (({"a": [1]},), "two data sets or more"),
        (({"a": [1], "b": []},), "has no rows"),
        ((ROWS, {"law": 1.0}), "a positive number for each"),
        ((ROWS, {"law": 1.0, "code": 0.0}), "a positive number for each"),
    ):
        with pytest.raises(ValueError, match=message):
            MixedData(*given)
    data = MixedData(ROWS)
    with pytest.raises(ValueError, match="batches of each"):
        DynamicMixing(data, {"law": BATCHES["law"]})
    for given in ({"eta": -1}, {"smoothing": 2}, {"steps": 1.5}):
        with pytest.raises(ValueError, match=next(iter(given))):
            DynamicMixing(data, BATCHES, **given)


@pytest.mark.parametrize("weight", [True, "1", None, float("nan"), float("inf"), 1e308, 0, -1.0, 10**400])
def test_a_weight_that_is_no_positive_number_is_refused(weight):
    with pytest.raises(ValueError, match=r"weights=.* must have a positive number for each of"):
        MixedData({"law": [1], "code": [2]}, {"law": weight, "code": 1.0})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loads_that_are_not_finite_set_no_weights(value):
    with pytest.raises(ValueError, match="loads of the experts are not finite"):
        next_weights([0.5, 0.5], torch.tensor([[1.0, value], [0.5, 0.5]]))
