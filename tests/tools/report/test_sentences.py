"""Tokens in context have the experts that the routers gave them, without padding, at a place of some layers."""

from __future__ import annotations

import torch
from peft import get_peft_model

import moe_peft
from moe_peft.tools.report.measure import measure_routing
from moe_peft.tools.report.sentences import read_sentences, shown_places, written
from tests.contract.cases import MODELS, randomize
from tests.tiny import padded_batch
from tests.train.tiny_run import make_tokenizer

from .conftest import batches_of, routed_model


def test_weights_are_those_of_the_tokens_without_padding():
    model, groups = routed_model(), batches_of("law", "code")
    wanted = shown_places(measure_routing(model, groups))
    found = read_sentences(model, make_tokenizer(), groups, wanted, per_group=2)
    assert [own.group for own in found] == ["law", "law", "code", "code"]
    for row, own in enumerate(found[:2]):
        batch = {name: value[row : row + 1] for name, value in groups["law"][0].items()}
        with torch.no_grad(), moe_peft.telemetry.record(model) as routings:
            model(**batch)
        length = int(batch["attention_mask"].sum())
        assert own.tokens == [" <unk>" if i == 3 else f" w{i}" for i in batch["input_ids"][0, :length].tolist()]
        for (place, _), weights in own.weights.items():
            torch.testing.assert_close(weights, routings[place][0].gate_matrix()[:length])


def test_places_are_of_the_first_a_middle_and_the_last_layer():
    case = MODELS["deepseek_v2"]
    model = get_peft_model(case.build(), case.config("molora"))
    randomize(model)
    places = measure_routing(model, {"all": [padded_batch([5])]})
    layers = [place.split(".")[2] for place, _ in shown_places(places)]
    assert layers == ["0", "1", "2"]
    assert len(shown_places(places, 1)) == 1


def test_decisions_by_head_are_averaged_and_decoders_are_left_out():
    case = MODELS["t5"]
    model = get_peft_model(case.build(), case.config("mov"))
    randomize(model)
    groups = {
        "all": [
            {k: v for k, v in case.batch().items() if k != "labels"} | {"decoder_input_ids": torch.ones(3, 9).long()}
        ]
    }
    places = measure_routing(model, groups)
    (own, *_) = read_sentences(model, make_tokenizer(), groups, [(p.place, p.adapter) for p in places], per_group=1)
    assert own.weights and all(place.startswith("encoder") and len(w) == 9 for (place, _), w in own.weights.items())


def test_tokens_are_written_with_the_space_before_them():
    class Pieces:
        def convert_ids_to_tokens(self, ids):
            return ["\u0120the", "n", "\u010a", None]

        def decode(self, ids, skip_special_tokens):
            return [" the", "n", "\n", ""][ids[0]]

    assert written(Pieces(), [0, 1, 2, 3]) == [" the", "n", "\\n", "[3]"]

    class Words(Pieces):
        def convert_ids_to_tokens(self, ids):
            return ["play", "##ing"]

        def decode(self, ids, skip_special_tokens):
            return ["play", "##ing"][ids[0]]

    assert written(Words(), [0, 1]) == [" play", "ing"]
