"""Figures are there where their numbers are, and of no empty ones."""

from __future__ import annotations

import pytest
from peft import get_peft_model

from moe_peft.tools import routing_report
from moe_peft.tools.report import figures
from tests.contract.cases import METHODS, MODELS
from tests.tiny import padded_batch

from .conftest import batches_of, routed_model


def test_kinds_of_places_share_a_panel(made):
    names = [kind for kind, _ in figures.of_kinds(made.places)]
    assert "mlp.down_proj" in names and len(names) == len(figures.importance_figures(made))
    assert all(len(own) == 2 for _, own in figures.of_kinds(made.places))


def test_load_is_drawn_only_where_tokens_choose():
    model = get_peft_model(MODELS["llama"].build(), METHODS["molora"](task_type="CAUSAL_LM"))
    dense = routing_report(model, {"all": [padded_batch([5, 3])]})
    assert figures.load_figures(dense) == [] and figures.importance_figures(dense)
    assert figures.similarity_figures(dense) == []  # nothing has been learned
    assert figures.group_figures(dense) == figures.history_figures(dense) == []


def test_groups_are_drawn_where_they_differ_most():
    made = routing_report(routed_model(), batches_of("law", "code"))
    apart = made.divergences()
    widest = max(apart, key=apart.__getitem__)
    pairs, served, by_layer = figures.group_figures(made)
    assert widest in served and "Divergence of each pair" in pairs and "<polyline" in by_layer


@pytest.mark.parametrize(("value", "name"), [("model.layers.*.mlp.up", "mlp.up"), ("score", "score"), ("h.*", "h.*")])
def test_places_are_called_by_what_stands_behind_their_layer(value, name):
    assert figures.short(value) == name
