"""Values in messages are shown whatever they are, and cut; warnings point at the user's own line."""

from __future__ import annotations

import ast
import re
import warnings
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

import moe_peft
from moe_peft import (
    EsftConfig,
    ExpertScores,
    LoraMoeConfig,
    MoePeftWarning,
    RoutedConfig,
    describe,
    messages,
    push_adapter,
    routed_layers,
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
        lambda: get_peft_model(tiny_llama(), RoutedConfig(target_modules=["q_proj", "nowhere"])),
        lambda: get_peft_model(tiny_llama(), RoutedConfig()).unmerge_adapter(),
        lambda: routed_layers(get_peft_model(tiny_llama(), RoutedConfig()))[0].train()(torch.randn(2, 32)),
    ],
    ids=["configuration", "a paper's", "get_peft_model", "a method of peft", "a layer's call"],
)
def test_a_warning_points_at_the_line_of_the_user(make):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MoePeftWarning)
        make()
    own = [warning.filename for warning in caught if issubclass(warning.category, MoePeftWarning)]
    assert own and set(own) == {__file__}


class Everything:
    def __contains__(self, name):
        return True


def test_where_no_caller_is_the_users_a_warning_points_at_the_nearest_one_outside_of_the_package(monkeypatch):
    monkeypatch.setattr(messages, "LIBRARIES", Everything())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        RoutedConfig(top_k=1, norm_topk_prob=True)
    assert [warning.filename for warning in caught] == [__file__]


FILES = [path for path in sorted(Path(moe_peft.__file__).parent.rglob("*.py")) if path.name != "messages.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_file_guesses_whom_a_warning_points_at(path):
    assert not re.search(r"warnings\.warn\b|stacklevel", path.read_text())


# A pattern that is made to be copied from the message whole.
NOT_CUT = {"encoder_pattern(encoder_names(model))"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_text_shows_a_value_without_cutting_it(path):
    tree = ast.parse(path.read_text())
    formatted = [
        node for node in ast.walk(tree) if isinstance(node, ast.FormattedValue) and node.conversion == ord("r")
    ]
    bare = {ast.unparse(node.value) for node in formatted} - NOT_CUT
    named = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "repr"]
    assert not bare and not named, f"Write {{shown(value)}}, from moe_peft.messages: {bare}"


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
