"""PERFT in training: its router loss through the real model, its noise, and the authors' initialisation."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model

from moe_peft import PerftConfig, router_loss
from moe_peft.forward.objective import router_loss_values
from moe_peft.layers import RoutedLayer
from tests import reference
from tests.perft_models import SPARSE, perft_config, perft_model, sparse_model
from tests.tiny import padded_batch, tiny_llama


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("name", SPARSE)
def test_router_loss_is_the_balance_of_our_router_alone_over_the_valid_tokens(name, checkpointing):
    model = perft_model(name, "R", num_experts=4, router_aux_loss_coef=0.3).train()
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    batch, inputs = padded_batch([9, 6]), {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, RoutedLayer)}
    for layer_name, layer in layers.items():
        keep = lambda module, args, key=layer_name: inputs.setdefault(key, args[0].detach())  # noqa: E731
        layer.register_forward_pre_hook(keep)
    model(**batch)
    valid = batch["attention_mask"].reshape(-1).bool().tolist()
    assert not all(valid)
    expected = []
    for layer_name, layer in layers.items():
        x = inputs[layer_name].reshape(-1, 32)
        probs = reference.router_probs(x, layer.router["default"].weight)
        expected.append(reference.load_balancing(probs, reference.choose(probs, 2), valid))
    values = router_loss_values(model)
    assert set(values) == {"load_balancing"}
    torch.testing.assert_close(router_loss(model).detach().double(), 0.3 * sum(expected).detach())
    # Earlier routers also feel the balance of later ones; the last one feels its own alone.
    last = list(layers.values())[-1].router["default"].weight
    (alone,) = torch.autograd.grad(0.3 * expected[-1], [last])
    gradients = []
    for weight in (1.0, 0.0):
        model.zero_grad()
        loss = model(**batch, labels=batch["input_ids"]).loss
        (loss + weight * router_loss(model)).backward()
        gradients.append(last.grad.clone())
    torch.testing.assert_close(gradients[0] - gradients[1], alone, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("variant", ["E", "D", "S"])
def test_variants_without_a_router_have_no_router_loss(variant):
    model = perft_model("olmoe", variant).train()
    model(**padded_batch([9, 6]))
    assert float(router_loss(model)) == 0 and not router_loss_values(model)


def test_the_authors_initialisation_has_their_statistics():
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(hidden_size=512, intermediate_size=64), PerftConfig(r=8, init_weights="perft"))
    bank = next(m.experts["default"] for m in model.modules() if isinstance(m, RoutedLayer))
    assert abs(bank.A.std().item() - 0.5) < 0.01 and abs(bank.A.mean().item()) < 0.02
    assert abs(bank.B.std().item() - 1e-6) < 2e-8


def test_the_authors_initialisation_starts_close_to_the_base_but_not_at_it():
    base = sparse_model("olmoe")
    model = get_peft_model(copy.deepcopy(base), perft_config("R", init_weights="perft")).eval()
    batch = padded_batch([9, 6])
    difference = (model(**batch).logits - base(**batch).logits).abs().max()
    assert 0 < difference < 1e-3


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_dropout": 0.5},
        {"lora_dropout": 0.5, "experts": "bottleneck"},
        {"lora_dropout": 0.5, "variant": "E"},
        {"lora_dropout": 0.5, "variant": "S"},
        {"expert_dropout": 0.5},
        {"router_jitter_noise": 0.9},
    ],
)
def test_noise_acts_in_training_passes_alone(fields):
    fields = {"variant": "R", **fields}
    model, batch = perft_model("olmoe", **fields), padded_batch([9, 6])
    quiet = perft_model("olmoe", fields["variant"], **{k: v for k, v in fields.items() if k == "experts"})
    expected = quiet(**batch).logits
    assert torch.equal(model(**batch).logits, expected)
    model.train()
    assert not torch.allclose(model(**batch).logits, expected)
    with torch.no_grad():  # as where a trainer generates in train mode
        assert torch.equal(model(**batch).logits, expected)
