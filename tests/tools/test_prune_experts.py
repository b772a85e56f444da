"""A smaller adapter is the same one where what it lacks was not used, and its loss is measured where it was."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model

from moe_peft import MoloraConfig, RoutedConfig, routed_layers
from moe_peft.telemetry.history import RoutingHistory
from moe_peft.tools import prune_experts, router_norms
from tests.contract.cases import randomize
from tests.tiny import padded_batch, tiny_llama
from tests.tools.exported import logits

BATCHES = [padded_batch([7, 5]), padded_batch([6, 6], seed=1)]


def adapted(**fields):
    settings = {"scorer": "layer_logits", "router": "dense", "num_experts": 4, "r": 2, "target_modules": ["q_proj"]}
    model = get_peft_model(tiny_llama(), RoutedConfig(**{**settings, **fields}))
    randomize(model)
    return model.eval()


@torch.no_grad()
def set_logits(model, rows):
    for layer, row in zip(routed_layers(model), rows, strict=True):
        next(layer.router["default"].parameters()).copy_(torch.tensor(row))


def test_leaving_out_experts_that_nothing_uses_loses_nothing_and_loads_anywhere(tmp_path):
    model = adapted()
    set_logits(model, [[-1e4, 1.0, -1e4, 0.5], [2.0, -1e4, -1e4, 0.0]])
    expected = logits(model)
    found = prune_experts(model, "small", 2, BATCHES)
    assert list(found.kept.values()) == [[1, 3], [0, 3]]
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)
    assert found.difference.divergence == pytest.approx(0, abs=1e-6) and found.difference.agreement == 1
    model.save_pretrained(tmp_path, selected_adapters=["small"])
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "small")
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("by", ["importance", "load"])
def test_what_is_lost_is_what_both_adapters_say_about_the_batches(by):
    model = adapted(scorer="linear", router="top_k", top_k=2)
    found = prune_experts(model, "small", 3, BATCHES, by=by)
    small = [torch.log_softmax(model(**batch).logits.float(), -1) for batch in BATCHES]
    model.set_adapter("default")
    whole = [torch.log_softmax(model(**batch).logits.float(), -1) for batch in BATCHES]
    masks = [batch["attention_mask"][:, 1:].bool() for batch in BATCHES]
    parts = [(a.exp() * (a - b)).sum(-1)[:, :-1][mask] for a, b, mask in zip(whole, small, masks, strict=True)]
    assert found.difference.divergence == pytest.approx(float(torch.cat(parts).mean()), abs=1e-6)
    assert found.difference.divergence > 0


def test_equal_experts_merge_without_loss_where_pruning_has_one():
    model = adapted()
    for layer in routed_layers(model):
        bank = layer.experts["default"]
        with torch.no_grad():
            for tensor in (bank.A, bank.B):
                tensor[2:] = tensor[:2]
    set_logits(model, [[1.0, 0.5, 0.5, 1.0], [1.0, 0.5, 0.5, 1.0]])
    found = prune_experts(model, "merged", 2, BATCHES, merge=True)
    assert all(sorted(map(sorted, own)) == [[0, 2], [1, 3]] for own in found.merged.values())
    for layer in routed_layers(model):
        old, new = layer.experts["default"], layer.experts["merged"]
        for place, expert in enumerate(found.kept["model.layers.0.self_attn.q_proj"]):
            torch.testing.assert_close(new.B[place].T @ new.A[place], old.B[expert].T @ old.A[expert])


def test_the_experts_whose_router_vectors_grew_most_are_kept(tmp_path):
    model = adapted(scorer="linear", router="top_k", top_k=2)
    start = router_norms(model)
    grown = {layer.place: [expert, 3 - expert] for expert, layer in enumerate(routed_layers(model))}
    with torch.no_grad():
        for layer in routed_layers(model):
            weight = layer.router["default"].weight
            weight *= 0.5  # what shrinks counts least
            weight[grown[layer.place]] *= 4
    found = prune_experts(model, "small", 2, BATCHES, by="router_change", initial_norms=start)
    assert [set(own) for own in found.kept.values()] == [set(own) for own in grown.values()]
    history = RoutingHistory()
    history.initial_norms = {f"{place}/default": own for place, own in start.items()}
    history.save(tmp_path)
    again = prune_experts(model, "again", 2, BATCHES, by="router_change", initial_norms=tmp_path, merge=True)
    assert again.kept == found.kept
    model.save_pretrained(tmp_path, selected_adapters=["again"])
    again.write_card(tmp_path / "again")
    assert f"| loss after | {again.difference.loss_after:.4g} |" in (tmp_path / "again/README.md").read_text()


@pytest.mark.parametrize("by", ["importance", "router_change", "scores"])
def test_places_of_a_block_that_share_a_decision_keep_the_same_experts(by):
    places = {"target_modules": ["q_proj", "k_proj"], "router_scope": "block"}
    model = adapted(scorer="linear", router="top_k", top_k=2, **places)
    norms = router_norms(model)
    assert len(norms) == 2
    given = {"router_change": {"initial_norms": norms}, "scores": {"scores": dict.fromkeys(norms, (3, 1, 2, 0))}}
    kept = list(prune_experts(model, "small", 2, BATCHES, by=by, **given.get(by, {})).kept.values())
    assert len(kept) == 4 and kept[0] == kept[1] and kept[2] == kept[3]
    assert by != "scores" or kept == [[0, 2]] * 4


def test_scores_of_ones_own_choose():
    model = adapted()
    scores = {layer.place: [0.0, 5.0, -1.0, 1.0] for layer in routed_layers(model)}
    assert [*prune_experts(model, "s", 2, BATCHES, by="scores", scores=scores).kept.values()] == [[1, 3], [1, 3]]


def test_numbers_to_choose_by_that_do_not_fit_are_refused(tmp_path):
    model = adapted(scorer="linear", router="top_k")
    names, norms = list(model.state_dict()), router_norms(model)
    for fields, message in (
        ({"by": "router_change"}, "before training"),
        ({"by": "router_change", "initial_norms": tmp_path}, "no routing_history"),
        ({"by": "router_change", "initial_norms": {}}, "places without"),
        ({"by": "router_change", "initial_norms": {place: own[:2] for place, own in norms.items()}}, "4 finite"),
        ({"by": "scores"}, "needs scores"),
        ({"by": "scores", "scores": dict.fromkeys(norms, "many")}, "4 finite"),
        ({"by": "scores", "scores": {place: [1, 2, 3, float("nan")] for place in norms}}, "4 finite"),
        ({"scores": {}}, "Leave it out"),
        ({"by": ["load"]}, "must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            prune_experts(model, "small", 2, BATCHES, **fields)
    constant = adapted(scorer="linear", router="constant")
    starts = {layer.place: torch.ones(4) for layer in routed_layers(constant)}
    with pytest.raises(ValueError, match="no vector for each expert"):
        prune_experts(constant, "small", 2, BATCHES, by="router_change", initial_norms=starts)
    assert list(model.state_dict()) == names


def test_one_expert_cannot_be_left_out():
    model = adapted(num_experts=1)
    with pytest.raises(ValueError, match="'default' has a layer with one expert, which cannot be left out"):
        prune_experts(model, "small", 1, BATCHES)
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep": 4}, "from 1 to 3"),
        ({"keep": 0}, "from 1 to 3"),
        ({"by": "luck"}, "must be one of"),
        ({"batches": []}, "one or more dicts"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_changes(fields, message):
    model = adapted()
    names = list(model.state_dict())
    given = {"keep": 2, "batches": BATCHES, **fields}
    with pytest.raises(ValueError, match=message):
        prune_experts(model, "small", given.pop("keep"), given.pop("batches"), **given)
    other = get_peft_model(tiny_llama(), RoutedConfig(experts="shared_down", num_experts=4))
    with pytest.raises(ValueError, match="pairs of matrices"):
        prune_experts(other, "small", 2, BATCHES, merge=True)
    with pytest.raises(ValueError, match="No layer holds"):
        prune_experts(get_peft_model(tiny_llama(), MoloraConfig()), "small", 2, BATCHES, adapter_name="none")
    assert list(model.state_dict()) == names
