"""LoRAs are chosen by their loss on examples and by how unlike they are, and the model stays as it is."""

from __future__ import annotations

import shutil

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F

from moe_peft.tools import choose_loras, compose
from tests.tiny import padded_batch, tiny_gpt2, tiny_llama
from tests.tools.exported import trained_lora

# What the first LoRA has learned.
EXAMPLES = [padded_batch([9, 6], seed=0)]


@pytest.fixture(scope="module")
def candidates(tmp_path_factory):
    """One that has learned the examples, a copy of it under another scale, and two others of other shapes."""
    folder = tmp_path_factory.mktemp("loras")
    own = {name: trained_lora(folder / name, seed, r=r) for name, seed, r in (("law", 0, 4), ("tax", 1, 2))}
    own["art"] = trained_lora(folder / "art", 2, use_rslora=True, target_modules=["v_proj", "up_proj"])
    shutil.copytree(own["law"], folder / "again")
    return {name: str(path) for name, path in {**own, "again": folder / "again"}.items()}


def test_losses_are_those_of_stock_peft_and_the_model_is_untouched(candidates):
    model = tiny_llama().train()
    before = {name: own.clone() for name, own in model.state_dict().items()}
    found = choose_loras(model, candidates, EXAMPLES, k=1)
    for name, folder in candidates.items():
        stock = PeftModel.from_pretrained(tiny_llama(), folder).eval()
        with torch.no_grad():
            logits = stock(**EXAMPLES[0]).logits[:, :-1].flatten(0, 1)
        labels = EXAMPLES[0]["input_ids"].masked_fill(EXAMPLES[0]["attention_mask"] == 0, -100)[:, 1:].flatten()
        assert found.losses[name] == pytest.approx(float(F.cross_entropy(logits, labels)), abs=1e-5)
    assert (
        list(found.losses.values()) == sorted(found.losses.values()) and min(found.losses.values()) < found.base_loss
    )
    assert model.training and all(torch.equal(own, before[name]) for name, own in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_likeness_costs_so_that_a_copy_of_the_best_is_chosen_last(candidates):
    by_loss = choose_loras(tiny_llama(), candidates, EXAMPLES, k=2, diversity=0)
    assert set(by_loss.adapters) == {"law", "again"}
    diverse = choose_loras(tiny_llama(), candidates, EXAMPLES, k=4, diversity=5.0)
    assert next(iter(diverse.adapters)) in ("law", "again") and list(diverse.adapters)[-1] in ("law", "again")
    place = {name: index for index, name in enumerate(diverse.names)}
    assert float(diverse.similarity[place["law"], place["again"]]) == pytest.approx(1)
    assert abs(float(diverse.similarity[place["law"], place["tax"]])) < 0.5
    model = compose(tiny_llama(), diverse.adapters)
    assert model.peft_config["default"].num_experts == 4
    assert str(diverse).startswith(f"{next(iter(diverse.adapters))} (")


def test_likeness_is_that_of_the_whole_matrices(candidates):
    found = choose_loras(tiny_llama(), candidates, EXAMPLES, k=1)
    deltas = {}
    for name, folder in candidates.items():
        base = dict(tiny_llama().named_parameters())
        merged = PeftModel.from_pretrained(tiny_llama(), folder).merge_and_unload()
        deltas[name] = torch.cat([(own - base[key]).flatten().double() for key, own in merged.named_parameters()])
    matrix = torch.stack([deltas[name] for name in found.names])
    expected = F.cosine_similarity(matrix[:, None], matrix[None], dim=-1)
    torch.testing.assert_close(found.similarity, expected, rtol=0, atol=1e-5)


def test_what_cannot_be_chosen_from_is_refused(candidates):
    model = tiny_llama()
    for fields, kind, message in (
        ({"candidates": {}}, ValueError, "must be a dict"),
        ({"candidates": {1: "x"}}, TypeError, "must be a text"),
        ({"candidates": {"a": "nowhere"}, "k": 1}, ValueError, "holds no adapter"),
        ({"k": 5}, ValueError, "cannot be chosen"),
        ({"k": True}, ValueError, "whole number"),
        ({"diversity": -1}, ValueError, "0 or more"),
        ({"diversity": float("nan")}, ValueError, "0 or more"),
        ({"examples": []}, ValueError, "one or more dicts"),
        ({"examples": [{"input_ids": torch.ones(2, 1, dtype=torch.long)}]}, ValueError, "no token with a label"),
        ({"model": tiny_gpt2()}, ValueError, "of another base model"),
        ({"model": "llama"}, TypeError, "is no model"),
    ):
        given = {"model": model, "candidates": candidates, "examples": EXAMPLES, "k": 2, **fields}
        with pytest.raises(kind, match=message):
            choose_loras(given.pop("model"), given.pop("candidates"), given.pop("examples"), given.pop("k"), **given)
    assert not any(module._forward_hooks for module in model.modules())
