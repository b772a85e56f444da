"""Vectors of a centroid router: means of an expert's own texts, or what an expert answers most."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from moe_peft import RoutedConfig, routed_layers
from moe_peft.tools import fit_centroids, fit_directions
from tests.contract.cases import randomize
from tests.tiny import padded_batch, tiny_llama


def adapted(**fields):
    settings = {"scorer": "centroid", "num_experts": 3, "r": 2, "target_modules": ["q_proj", "down_proj"], **fields}
    model = get_peft_model(tiny_llama(), RoutedConfig(task_type="CAUSAL_LM", **settings)).eval()
    randomize(model)
    return model


def test_centroids_are_the_mean_inputs_of_the_base_model_on_an_experts_texts():
    model = adapted().train()
    batches = {e: [padded_batch([5, 3], seed=e), padded_batch([4], seed=9 + e)] for e in range(3)}
    fit_centroids(model, batches)
    assert model.training and not any(len(layer._forward_pre_hooks) for layer in routed_layers(model))
    base, seen = tiny_llama().eval(), []
    base.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for e, own in batches.items():
        seen.clear()
        with torch.no_grad():
            for batch in own:
                base(**batch)
        tokens = torch.cat([x[batch["attention_mask"] == 1] for x, batch in zip(seen, own, strict=True)])
        router = routed_layers(model)[0].router["default"]
        torch.testing.assert_close(router.weight[e], tokens.mean(0), rtol=1e-5, atol=1e-6)
        assert not router.weight.requires_grad


def test_directions_are_the_first_right_singular_vectors():
    model = adapted(router_args={"sign_agnostic": True})
    fit_directions(model)
    for layer in routed_layers(model):
        bank, router = layer.experts["default"], layer.router["default"]
        for e in range(3):
            right = torch.linalg.svd(bank.B[e].T @ bank.A[e]).Vh[0]
            assert abs(float(right @ router.weight[e])) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ({0: [padded_batch([3])]}, r"batches has the experts \[0\], but the adapter has \[0, 1, 2\]"),
        ({0: [padded_batch([3])], 1: [], 2: [padded_batch([3])]}, "expert 1: batches is empty"),
    ],
)
def test_texts_that_are_missing_are_refused_and_nothing_changes(batches, message):
    model = adapted()
    before = [layer.router["default"].weight.clone() for layer in routed_layers(model)]
    with pytest.raises(ValueError, match=message):
        fit_centroids(model, batches)
    after = [layer.router["default"].weight for layer in routed_layers(model)]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_adapters_without_prototypes_and_experts_without_directions_are_refused():
    with pytest.raises(ValueError, match="whose router takes a vector for each expert"):
        fit_directions(adapted(scorer="linear"))
    with pytest.raises(ValueError, match="does not know which direction"):
        fit_directions(adapted(experts="cp_diagonal"))
    fresh = get_peft_model(tiny_llama(), RoutedConfig(scorer="centroid", target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="answers nothing yet"):
        fit_directions(fresh)
