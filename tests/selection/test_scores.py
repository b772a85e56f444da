"""Scores survive a file bit for bit, and files of the authors' shape are read."""

from __future__ import annotations

import json

import pytest
import torch

from moe_peft import ExpertScores, score_experts
from moe_peft.selection.scores import LayerScores
from tests.scored_models import olmoe
from tests.tiny import padded_batch


@pytest.fixture(scope="module")
def scores():
    return score_experts(olmoe(), [padded_batch([7, 3, 5])], show_progress=False)


def test_scores_come_back_bit_for_bit(scores, tmp_path):
    scores.save(tmp_path / "summary.json")
    loaded = ExpertScores.load(tmp_path / "summary.json")
    assert (loaded.layers, loaded.num_experts, loaded.top_k) == ([0, 1], {0: 6, 1: 6}, {0: 2, 1: 2})
    for name in ("num_tokens", "num_samples", "model_parameters"):
        assert getattr(loaded, name) == getattr(scores, name) > 0
    for layer, own in scores.by_layer.items():
        assert loaded.by_layer[layer].expert_parameters == own.expert_parameters
        assert len(own.values) == 4
        assert all(torch.equal(loaded.by_layer[layer].values[kind], value) for kind, value in own.values.items())


def test_the_file_holds_the_authors_keys_with_layers_and_experts_as_strings(scores, tmp_path):
    scores.save(tmp_path / "summary.json")
    content = json.loads((tmp_path / "summary.json").read_text())
    for criterion in ("token", "gate"):
        by_layer = content[f"{criterion}_scores"]
        assert list(by_layer) == ["0", "1"] and list(by_layer["1"]) == [str(expert) for expert in range(6)]
        assert list(by_layer["1"].values()) == scores.of(1, criterion).tolist()


AUTHORS = {
    "token_scores": {"10": {"1": 0.25, "0": 0.5, "2": 0.25}, "2": {"0": 0.0, "1": 0.75, "2": 0.25}},
    "gate_scores": {"10": {"0": 0.2, "1": 0.1, "2": 0.05}, "2": {"0": 0.0, "1": 0.3, "2": 0.1}},
}


def test_a_file_of_the_authors_is_read_in_the_order_of_the_layers(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(AUTHORS))
    scores = ExpertScores.load(path)
    assert scores.layers == [2, 10] and scores.num_experts == {2: 3, 10: 3}
    assert scores.of(10).tolist() == [0.5, 0.25, 0.25] and scores.of(2, "gate").tolist() == [0.0, 0.3, 0.1]
    assert scores.top_k == {2: None, 10: None} and scores.num_tokens is None
    with pytest.raises(ValueError, match=r"aggregate='sample': .* as the authors' files do\. Use aggregate='token'"):
        scores.of(2, aggregate="sample")
    scores.save(path)
    assert json.loads(path.read_text())["token_scores"]["10"] == {"0": 0.5, "1": 0.25, "2": 0.25}
    assert "sample_token_scores" not in json.loads(path.read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate_scores": {"2": AUTHORS["gate_scores"]["2"]}}, "Layer 10 has the scores .* same ones"),
        ({"gate_scores": {**AUTHORS["gate_scores"], "10": {"0": 0.5, "1": 0.1}}}, "Layer 10 .* one number per expert"),
        (
            {"gate_scores": {**AUTHORS["gate_scores"], "2": {"0": 0.1, "1": float("nan"), "2": 0.3}}},
            "gate scores of layer 2",
        ),
        (
            {"token_scores": {**AUTHORS["token_scores"], "2": {"0": -0.1, "1": 1.0, "2": 0.1}}},
            "token scores of layer 2",
        ),
        (
            {"token_scores": {**AUTHORS["token_scores"], "2": {"0": "0.1", "1": "0.9", "2": "0"}}},
            "token_scores, layer 2",
        ),
        ({"token_scores": {**AUTHORS["token_scores"], "2": [0.1, 0.9, 0.0]}}, "token_scores, layer 2"),
    ],
)
def test_scores_that_rank_nothing_are_refused_before_experts_are_selected(change, message, tmp_path):
    path = tmp_path / "summary.json"
    path.write_text(json.dumps({**AUTHORS, **change}))
    with pytest.raises(ValueError, match=message):
        ExpertScores.load(path)


def test_files_of_another_form_and_unknown_scores_are_refused(scores, tmp_path):
    path = tmp_path / "summary.json"
    path.write_text(json.dumps({"experts": {"1": [2]}}))
    with pytest.raises(ValueError, match=r"has no \['token_scores', 'gate_scores'\]"):
        ExpertScores.load(path)
    path.write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="Expert scores are"):
        ExpertScores.load(path)
    with pytest.raises(ValueError, match="no layer"):
        ExpertScores({})
    path.write_text(json.dumps({**AUTHORS, "token_scores": {"2": {"0": 0.5, "2": 0.5}}}))
    with pytest.raises(ValueError, match="layer 2: the experts must be numbered from 0 to 1"):
        ExpertScores.load(path)
    with pytest.raises(ValueError, match=r"layer=7 has no experts; the layers with scores are \[0, 1\]"):
        scores.of(7)
    with pytest.raises(ValueError, match="criterion='load' must be one of"):
        scores.of(0, "load")
    with pytest.raises(ValueError, match="aggregate='layer' must be one of"):
        scores.of(0, "gate", "layer")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5, 1e300])
def test_a_score_that_no_mean_can_be_is_named_with_its_expert(value):
    layer = LayerScores({("token", "token"): torch.tensor([0.5, value, 0.5], dtype=torch.float64)})
    with pytest.raises(ValueError, match=r"token scores of layer 3 have .* for expert 1; a score is zero or"):
        ExpertScores({3: layer})


@pytest.mark.parametrize("values", [[0.5, 0.5], torch.ones(2, 2), torch.ones(2, dtype=torch.int64), None])
def test_scores_that_are_no_numbers_by_expert_are_refused(values):
    with pytest.raises(ValueError, match=r"of layer 3 .* must be a tensor of one floating point number per expert"):
        ExpertScores({3: LayerScores({("token", "token"): values})})
