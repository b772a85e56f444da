"""Single tensors that their part never trains stay frozen, whatever switches the adapter on."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from moe_peft import RoutedConfig, routed_layers
from moe_peft.extend import EXPERTS, SELECTORS, Experts, TopK
from tests.tiny import padded_batch, tiny_llama


class Biased(TopK):
    """The k largest, beside a bias that nothing trains."""

    def tensors(self, num_experts):
        return {"bias": torch.zeros(num_experts)}

    def __call__(self, logits_TE, probs_TE, context, num_experts, *, bias):
        return super().__call__(logits_TE, probs_TE + bias, context, num_experts)


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(SELECTORS, "biased", Biased)


def config():
    return RoutedConfig(router="biased", num_experts=3, target_modules=["q_proj"])


def assert_frozen(model):
    for layer in routed_layers(model):
        router = layer.router["default"]
        assert router.weight.requires_grad and not router.bias.requires_grad


def enter_and_leave(model):
    with model.disable_adapter():
        pass


def switch_between_two(model):
    model.add_adapter("other", config())
    for name in ("other", "default"):
        model.set_adapter(name)
    model.delete_adapter("other")


SWITCHES = {
    "made": lambda model: None,
    "set_adapter": lambda model: model.set_adapter("default"),
    "disable_adapter": enter_and_leave,
    "set_requires_grad": lambda model: model.set_requires_grad("default", True),
    "layer": lambda model: [layer.requires_grad_(True) for layer in routed_layers(model)],
    "another adapter": switch_between_two,
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_frozen_tensor_stays_frozen(switch):
    model = get_peft_model(tiny_llama(), config())
    SWITCHES[switch](model)
    assert_frozen(model)


def test_a_frozen_tensor_is_saved_and_no_optimizer_moves_it(tmp_path):
    model = get_peft_model(tiny_llama(), config()).train()
    for layer in routed_layers(model):
        layer.router["default"].bias.data.fill_(3.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    model(**padded_batch([5, 3]), labels=padded_batch([5, 3])["input_ids"]).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    assert_frozen(again)
    assert all((layer.router["default"].bias == 3).all() for layer in routed_layers(again))


class OfTokens(Experts):
    """Adds a vector of the token's id: a bank that must be told the ids, in evaluation too."""

    fields = ("init_weights",)
    context_needs = frozenset({"token_ids"})

    def __init__(self, in_features, out_features, *, num_experts, r, init_weights=True):
        super().__init__()
        self.num_choices = num_experts
        self.v = nn.Parameter(torch.randn(num_experts, 16, out_features))

    @classmethod
    def shapes(cls, num_experts, r):
        return {"v": (num_experts, 16)}

    def prepare(self, x_TD, context):
        return self.v[:, context.token_ids % 16]

    def combine(self, h, base_out_TO, routing, *, in_place=False):
        return base_out_TO + torch.einsum("te,eto->to", routing.gate_matrix(), h)


def test_a_bank_is_told_what_it_needs_of_the_tokens_in_training_and_in_evaluation(monkeypatch):
    monkeypatch.setitem(EXPERTS, "of_tokens", OfTokens)
    model = get_peft_model(tiny_llama(), RoutedConfig(experts="of_tokens", num_experts=2, target_modules=["q_proj"]))
    batch = padded_batch([5, 3])
    for training in (True, False):
        model.train(training)
        with torch.no_grad():
            first = model(**batch).logits
            other = model(**{**batch, "input_ids": batch["input_ids"].roll(1, 1)}).logits
        assert torch.isfinite(first).all() and not torch.equal(first, other)
