"""Whatever a file of scores or a selection holds, it is read or refused with its name and the reason."""

from __future__ import annotations

import json
import random

import pytest

from moe_peft import EsftConfig, ExpertScores, ExpertSelection
from moe_peft.selection.files import is_whole, layer_index, wrong_experts

SCORES = {"token_scores": {"1": {"0": 0.25, "1": 0.75}}, "gate_scores": {"1": {"0": 0.1, "1": 0.2}}}
SELECTION = {"experts": {"1": [0, 2]}, "shared_experts": False, "non_expert_modules": False, "num_experts": {"1": 4}}
NO_INDEX = ["\u00b2", "\u0663", "-1", "1.0", "", " 1", "1_0", "9" * 5000, "one", "0x1", "true"]


@pytest.mark.parametrize("key", [*NO_INDEX, True, -1, 1.0, None, 10**400, (1,)], ids=lambda key: "")
def test_only_decimal_digits_and_whole_numbers_name_a_layer(key):
    assert layer_index(key) is None
    assert "is no layer" in wrong_experts({key: [0]})


def test_indices_and_counts_are_whole():
    assert layer_index("007") == 7 and layer_index(0) == 0
    assert is_whole(3) and not any(map(is_whole, (True, -1, 1.0, "1", 10**9, None)))
    assert not is_whole(0, least=1)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "\x00",
        "[" * 100_000,
        '{"a":' * 50_000,
        "9" * 5000,
        "[1]",
        "null",
        '"text"',
        "NaN",
        '{"experts": {}, "experts": {}}',
    ],
    ids=lambda text: "",
)
def test_what_is_no_object_is_refused_with_the_name_of_the_file(text, tmp_path):
    path = tmp_path / "file.json"
    path.write_text(text)
    for kind in (ExpertScores, ExpertSelection):
        with pytest.raises(ValueError, match=r"file\.json is no") as error:
            kind.load(path)
        assert len(str(error.value)) < 800
    path.write_bytes(b"\xff\xfe{}")
    for kind in (ExpertScores, ExpertSelection):
        with pytest.raises(ValueError, match=r"file\.json is no .* cannot be read as JSON"):
            kind.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": {"1": [0, 4]}}, "layer '1' has the experts 0 to 3, and 4 is none of them"),
        ({"experts": {"1": [True]}}, "different expert ids"),
        ({"experts": {"1": [10**400]}}, "different expert ids"),
        ({"experts": {"1": "01"}}, "different expert ids"),
        ({"experts": {"1": [0], "01": [1]}}, "a layer is named twice"),
        ({"shared_experts": "false"}, "shared_experts='false' must be True or False"),
        ({"shared_experts": 1}, "shared_experts=1 must be True or False"),
        ({"non_expert_modules": "no"}, "non_expert_modules='no' must be True or False"),
        ({"num_experts": {"1": True}}, "num_experts=.* must be a dict"),
        ({"num_experts": {"1": "4"}}, "num_experts=.* must be a dict"),
        ({"num_experts": {"1": 0}}, "num_experts=.* must be a dict"),
        ({"num_experts": {"x": 4}}, "num_experts=.* must be a dict"),
    ],
)
def test_a_selection_of_other_values_is_refused(change, message, tmp_path):
    path = tmp_path / "file.json"
    path.write_text(json.dumps({**SELECTION, **change}))
    with pytest.raises(ValueError, match=rf"file\.json.*{message}"):
        ExpertSelection.load(path)
    fields = {**SELECTION, **change}
    with pytest.raises(ValueError, match=message):
        ExpertSelection(fields.pop("experts"), **fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_scores": {"\u00b2": {"0": 1.0}}}, "the index of a layer as every key"),
        ({"token_scores": {"9" * 5000: {"0": 1.0}}}, "the index of a layer as every key"),
        ({"token_scores": {"1": {"0": 0.5, "00": 0.5}}}, "numbered from 0 to 1"),
        ({"token_scores": {"1": {"0": True, "1": 0.5}}}, "True is no score"),
        ({"token_scores": {"1": {"0": 10**400, "1": 0.5}}}, "is no score"),
        ({"token_scores": {"1": None}}, "numbered from 0"),
        ({"token_scores": [1]}, "the index of a layer as every key"),
        ({"gate_scores": "x"}, "the index of a layer as every key"),
        ({"gate_scores": {"2": {"0": 1.0, "1": 0.0}}}, "same ones"),
        ({"top_k": 5}, "the index of a layer as every key"),
        ({"top_k": {"1": "2"}}, "top_k, layer 1: '2' must be a positive whole number"),
        ({"expert_parameters": {"1": 1.5}}, "1.5 must be a positive whole number"),
        ({"num_tokens": "many"}, "num_tokens: 'many' must be a positive whole number"),
        ({"model_parameters": True}, "True must be a positive whole number"),
    ],
)
def test_scores_of_other_values_are_refused(change, message, tmp_path):
    path = tmp_path / "file.json"
    path.write_text(json.dumps({**SCORES, **change}))
    with pytest.raises(ValueError, match=rf"{message}"):
        ExpertScores.load(path)


VALUES = [None, True, "x", "1", 1, -1, 1.5, 1e300, 10**30, [], [[1]], {}, {"1": 1}, {"\u00b2": []}, {"0": {"0": 1}}]


def damaged(content: object, rng: random.Random) -> object:
    """The content with one value, at any depth, in the place of another."""
    if not isinstance(content, dict) or not content or rng.random() < 0.3:
        return rng.choice(VALUES)
    key = rng.choice(list(content))
    return {**content, key: damaged(content[key], rng)}


@pytest.mark.parametrize("seed", range(4))
def test_files_damaged_at_random_are_read_or_refused_by_name(seed, tmp_path):
    rng, path = random.Random(seed), tmp_path / "file.json"
    for kind, content in ((ExpertScores, SCORES), (ExpertSelection, SELECTION)):
        for _ in range(150):
            text = json.dumps(damaged(content, rng))
            path.write_text(text)
            try:
                loaded = kind.load(path)
            except ValueError as error:
                assert "file.json" in str(error) or "scores" in str(error), (text, str(error))
            else:
                loaded.save(path)


@pytest.mark.parametrize("ids", [range(10**12), range(10**400), [10**400], ["0"], [[0]], "01", 5], ids=lambda ids: "")
def test_a_configuration_refuses_what_a_file_may_not_hold(ids):
    with pytest.raises(ValueError, match=r"^EsftConfig: experts=") as error:
        EsftConfig(experts={"1": ids})
    assert len(str(error.value)) < 800
