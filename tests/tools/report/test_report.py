"""The numbers beside the page are those that were measured, whole JSON, for every method."""

from __future__ import annotations

import json

import pytest
from peft import get_peft_model

import moe_peft
from moe_peft.tools import routing_report
from tests.contract.cases import MODELS, randomize
from tests.tiny import padded_batch
from tests.tools.exported import digest
from tests.train.tiny_run import make_tokenizer

from .conftest import batches_of, routed_model


def test_numbers_are_written_beside_the_page(made, tmp_path):
    path = made.save(tmp_path / "new/report", plots=False)
    assert sorted(file.name for file in path.parent.iterdir()) == ["index.html", "numbers.json"]
    found = json.loads((path.parent / "numbers.json").read_text(), parse_constant=pytest.fail)
    assert found["groups"] == {"law": {"tokens": 22}, "<b>poems</b>": {"tokens": 22}}
    assert len(found["places"]) == len(made.places)
    for own, place in zip(found["places"], made.places, strict=True):
        assert own["importance"] == pytest.approx(place.total.importance.tolist(), abs=1e-6)
        assert set(own["importance_by_group"]) == set(made.groups)
    assert found["divergence"]["mean"] == pytest.approx(sum(made.divergences().values()) / len(made.places), abs=1e-6)
    assert found["divergence"]["pairs"][0][1] == pytest.approx(found["divergence"]["mean"], abs=1e-6)
    assert found["divergence"]["by_chance"] > 0
    assert len(found["sentences"]) == 4 and found["history"]["steps"] == [10, 20, 30]
    assert all({"kind", "evidence", "action", "field"} <= own.keys() for own in found["advice"])


@pytest.mark.parametrize("method", ["mov", "perft-r", "perft-s", "perft-e", "esft", "expert-lora-selected", "loramoe"])
def test_a_report_of_every_kind_of_adapter_is_written(method, tmp_path):
    case = MODELS["olmoe"]
    model = get_peft_model(case.build(), case.config(method))
    randomize(model)
    batches = {"all": [padded_batch([6, 3]), padded_batch([4, 5], seed=1)]}
    made = routing_report(model, batches, tokenizer=make_tokenizer())
    written = made.save(tmp_path, plots=False).read_text()
    assert (
        "Importance by layer and expert" in written and "Groups" not in written.partition("<body>")[2].split("<dl>")[0]
    )
    kinds = {own.kind for own in made.advice}
    assert ("backbone" in kinds) == (method in ("perft-e", "esft", "expert-lora-selected"))
    assert ("no_router" in kinds) == (method == "perft-s")
    assert bool(made.similarity) == (method != "perft-s")


def test_the_backbone_alone_can_be_reported_on(tmp_path):
    made = routing_report(MODELS["olmoe"].build(), {"all": [padded_batch([6, 3])]})
    assert made.facts is None and made.title == "OlmoeForCausalLM" and made.similarity == {}
    assert made.save(tmp_path, plots=False).is_file()


def test_wrong_arguments_are_refused_before_anything_is_written(made, tmp_path):
    model = routed_model()
    with pytest.raises(ValueError, match="max_tokens=0"):
        routing_report(model, batches_of("law"), max_tokens=0)
    with pytest.raises(ValueError, match="per_group=True"):
        routing_report(model, batches_of("law"), per_group=True)
    with pytest.raises(TypeError, match="must be a torch"):
        routing_report("model", batches_of("law"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        made.save(tmp_path / "file")


def test_an_interruption_leaves_the_report_that_was_there_or_none(made, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    made.save(tmp_path / "old", plots=False)
    before = digest(tmp_path)
    monkeypatch.setattr("moe_peft.tools.report.page.page", interrupted)
    for folder in ("old", "new/report"):
        with pytest.raises(KeyboardInterrupt):
            made.save(tmp_path / folder, plots=False)
    assert digest(tmp_path) == before


def test_names_of_the_package_are_public():
    assert moe_peft.tools.routing_report is routing_report
