"""An adapter grows by an expert, and the ones that it has stay what they are."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model

from moe_peft import RoutedConfig, routed_layers
from moe_peft.tools import add_expert, describe_experts
from tests.contract.cases import randomize
from tests.tiny import tiny_llama
from tests.tools.exported import logits, trained_lora

LAYER = {"scorer": "layer_logits", "router": "dense", "num_experts": 2, "r": 4}


def adapted():
    model = get_peft_model(tiny_llama(), RoutedConfig(target_modules=["q_proj", "up_proj"], **LAYER))
    randomize(model)
    return model.eval()


@torch.no_grad()
def route_to(model, name, expert):
    for layer in routed_layers(model):
        weight = next(layer.router[name].parameters())
        weight.fill_(-1e4)
        weight[expert] = 1e4


def test_the_new_expert_is_nothing_a_copy_or_a_lora_and_the_old_ones_stay(tmp_path):
    folder, model = trained_lora(tmp_path / "lora", r=3), adapted()
    route_to(model, "default", 1)
    old, base = logits(model), logits(tiny_llama())
    lora = logits(PeftModel.from_pretrained(tiny_llama(), folder))
    for name, fields, expected in (
        ("empty", {}, base),
        ("copy", {"copy_of": 1}, old),
        ("lora", {"lora": folder}, lora),
    ):
        add_expert(model, name, **fields)
        for expert, own in ((1, old), (2, expected)):
            route_to(model, name, expert)
            torch.testing.assert_close(logits(model), own, rtol=0, atol=1e-6)
        model.set_adapter("default")
    assert model.peft_config["lora"].num_experts == 3 and torch.equal(logits(model), old)


def described():
    fields = {"scorer": "domain_embedding", "router_args": {"width": 3, "hidden": 5}, "num_experts": 2, "r": 4}
    model = get_peft_model(tiny_llama(), RoutedConfig(target_modules=["q_proj", "up_proj"], **fields))
    randomize(model)
    return model.eval()


def test_a_description_alone_gives_a_new_expert_its_row_of_the_router():
    model = described()
    describe_experts(model, [[1.0, 2, 3], [-1, 0, 1]])
    rows = [layer.router["default"].rows(torch.float32) for layer in routed_layers(model)]
    add_expert(model, "new", description=[1.0, 2.0, 3.0])
    for layer, old in zip(routed_layers(model), rows, strict=True):
        router = layer.router["new"]
        torch.testing.assert_close(router.rows(torch.float32), old[[0, 1, 0]])
        assert not router.domains.requires_grad


def test_descriptions_that_do_not_fit_are_refused_before_anything_changes():
    model, other = described(), adapted()
    before = {key: own.clone() for key, own in model.state_dict().items()}
    for call, message in (
        (lambda: add_expert(model, "new", description=[1.0, 2.0]), r"shape \(2,\).*\(3,\)"),
        (lambda: add_expert(model, "new", description=[1.0, 2.0, float("nan")]), "not finite"),
        (lambda: add_expert(other, "new", description=[1.0, 2.0, 3.0]), "no rows of descriptions"),
        (lambda: describe_experts(model, [[1.0, 2, 3]]), r"shape \(1, 3\).*\[2\] experts.*width 3"),
        (lambda: describe_experts(model, "text"), "tensor or lists"),
        (lambda: describe_experts(model, [[1.0, 2, 3], [1.0]]), "tensor or lists"),
        (lambda: describe_experts(other, [[1.0], [2.0]]), "no rows of descriptions"),
        (lambda: describe_experts(model, [[1.0, 2, 3], [1, 2, 3]], "none"), "No layer holds"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], own) for key, own in before.items())


def test_what_does_not_fit_is_refused_before_anything_changes(tmp_path):
    model = adapted()
    names = list(model.state_dict())
    large = trained_lora(tmp_path / "large", r=5)
    elsewhere = trained_lora(tmp_path / "elsewhere", target_modules=["v_proj"])
    for fields, message in (
        ({"copy_of": 2}, "0 to 1"),
        ({"copy_of": True}, "0 to 1"),
        ({"copy_of": 0, "lora": large}, "not both"),
        ({"lora": large}, "Compose"),
        ({"lora": elsewhere}, "Compose"),
    ):
        with pytest.raises(ValueError, match=message):
            add_expert(model, "new", **fields)
    assert list(model.state_dict()) == names
