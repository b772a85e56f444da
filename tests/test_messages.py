"""Values in messages are shown whatever they are, and cut; warnings point at the user's own line."""

from __future__ import annotations

import warnings

import pytest
import torch

from moe_peft import (
    EsftConfig,
    ExpertScores,
    LoraMoeConfig,
    RoutedConfig,
    describe,
    push_adapter,
    score_experts,
    select_experts,
)
from moe_peft.messages import LIMIT, shown
from moe_peft.selection.scores import LayerScores
from tests.tiny import tiny_llama


class Broken:
    def __repr__(self):
        raise RuntimeError("no text")


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


VALUES = ["x" * 10**6, b"x" * 10**6, 10**5000, -(10**400), nested(100_000), Broken(), torch.randn(50, 50), ["y"] * 999]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_every_value_is_shown_on_one_line_within_the_limit(value):
    text = shown(value)
    assert 0 < len(text) <= LIMIT and "\n" not in text


def test_short_values_are_shown_as_they_are():
    assert [shown(value) for value in ("a", 5, None, [1], "x" * 100)] == ["'a'", "5", "None", "[1]", repr("x" * 100)]
    assert shown(10**5000) == f"<an integer of {(10**5000).bit_length()} bits>"
    assert shown(Broken()) == "<a Broken that cannot be shown>"


@pytest.mark.parametrize(
    "make",
    [
        lambda: RoutedConfig(top_k=1, norm_topk_prob=True),
        lambda: LoraMoeConfig(localized_balancing_delta=0.3),
    ],
)
def test_a_warning_points_at_the_line_that_makes_the_configuration(make):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make()
    assert [warning.filename for warning in caught] == [__file__]


LONG = "x" * 10_000
REFUSED = {
    "target_modules": lambda folder: describe(tiny_llama(), RoutedConfig(target_modules=[LONG])),
    "many targets": lambda folder: describe(tiny_llama(), RoutedConfig(target_modules=[f"a{i}" for i in range(5000)])),
    "layers": lambda folder: describe(tiny_llama(), RoutedConfig(layers_to_transform=list(range(100, 9000)))),
    "pattern": lambda folder: describe(tiny_llama(), RoutedConfig(layers_pattern=[LONG])),
    "group_column": lambda folder: LoraMoeConfig(group_column=LONG),
    "task_type": lambda folder: LoraMoeConfig(task_type=LONG),
    "router": lambda folder: RoutedConfig(router=LONG),
    "losses": lambda folder: RoutedConfig(losses={LONG: 0.1}),
    "describe": lambda folder: describe(LONG, RoutedConfig()),
    "scores": lambda folder: select_experts(LONG),
    "criterion": lambda folder: select_experts(SCORES, criterion=LONG),
    "score_mask": lambda folder: score_experts(tiny_llama(), [], score_mask=LONG),
    "experts": lambda folder: EsftConfig(experts={LONG: [0]}),
    "ids": lambda folder: EsftConfig(experts={"0": [-1] * 9000}),
    "base_model": lambda folder: push_adapter(str(folder), "a/b", base_model=LONG),
}
SCORES = ExpertScores({0: LayerScores({("token", "token"): torch.ones(2, dtype=torch.float64)})})


@pytest.mark.parametrize("name", REFUSED)
def test_a_long_value_is_cut_in_every_refusal(name, tmp_path):
    with pytest.raises(ValueError) as error:
        REFUSED[name](tmp_path)
    assert len(str(error.value)) < 1200, str(error.value)[:1500]
