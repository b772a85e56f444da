"""LoRAMoE as a layer of a model: its formula, its limits, and stock LoRA where they meet."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from moe_peft import LoraMoeConfig, describe, router_loss
from tests import reference
from tests.compare import assert_same
from tests.tiny import OneLinear, adapted_linear, padded_batch, routed_layer_of, tiny_llama


def config(**fields):
    return LoraMoeConfig(**{"num_experts": 4, "r": 3, "lora_alpha": 6, "lora_dropout": 0.0, **fields})


def parts_of(model):
    """Router weight, A, B as (E, O, r), and the base weight of the only routed layer."""
    layer = routed_layer_of(model)
    experts = layer.experts["default"]
    return layer.router["default"].weight, experts.A, experts.B, layer.get_base_layer().weight


@pytest.mark.parametrize("implementation", ["eager", "dense"])
@pytest.mark.parametrize("num_tokens", [0, 1, 13, 63])
@pytest.mark.parametrize("num_experts", [1, 4])
@pytest.mark.parametrize("training", [False, True])
def test_layer_equals_the_formula(implementation, num_tokens, num_experts, training):
    fields = {"num_experts": num_experts, "experts_implementation": implementation, "router_aux_loss_coef": 0.0}
    model = adapted_linear(config(**fields)).train(training)
    x = torch.randn(num_tokens, 7, dtype=torch.float64, requires_grad=True)
    Wg, A, B, W0 = parts_of(model)
    expected = reference.loramoe_layer(x, W0, Wg, A, B.mT, lora_alpha=6)
    assert_same(model(x), expected, [x, Wg, A, B], [x, Wg, A, B])


def test_layer_of_a_batch_is_the_layer_of_its_tokens():
    model = adapted_linear(config()).eval()
    x = torch.randn(3, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(model(x), model(x.reshape(15, 7)).view(3, 5, 5))


@pytest.mark.parametrize("implementation", ["eager", "dense"])
def test_one_expert_equals_plain_lora(implementation):
    ours = adapted_linear(config(num_experts=1, experts_implementation=implementation, router_aux_loss_coef=0.0))
    stock = get_peft_model(OneLinear(7, 5), LoraConfig(r=3, lora_alpha=6, target_modules=["linear"])).double()
    _, A, B, W0 = parts_of(ours)
    layer = stock.base_model.model.linear
    lora_A, lora_B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        lora_A.copy_(A[0])
        lora_B.copy_(B[0].T)
    assert torch.equal(layer.base_layer.weight, W0)
    x = torch.randn(13, 7, dtype=torch.float64, requires_grad=True)
    got = torch.autograd.grad(ours(x).square().sum(), [x, A, B])
    wanted = torch.autograd.grad(stock(x).square().sum(), [x, lora_A, lora_B])
    torch.testing.assert_close(ours(x), stock(x))
    torch.testing.assert_close(got[0], wanted[0])
    torch.testing.assert_close(got[1][0], wanted[1])
    torch.testing.assert_close(got[2][0].T, wanted[2])


def test_one_expert_merges_into_the_weight_of_merged_plain_lora():
    model = adapted_linear(config(num_experts=1)).eval()
    _, A, B, W0 = (part.detach().clone() for part in parts_of(model))
    x = torch.randn(13, 7, dtype=torch.float64)
    before = model(x)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged.linear.weight, W0 + 2.0 * B[0].T @ A[0])
    torch.testing.assert_close(merged(x), before)


def test_several_experts_refuse_to_merge():
    with pytest.raises(ValueError, match="so no fixed weight equals it and it cannot be merged"):
        adapted_linear(config()).merge_and_unload()


def test_zero_router_gives_mean_delta():
    model = adapted_linear(config()).eval()
    Wg, A, B, W0 = parts_of(model)
    torch.nn.init.zeros_(Wg)
    x = torch.randn(13, 7, dtype=torch.float64)
    mean = 2.0 * torch.stack([B[e].T @ A[e] for e in range(4)]).mean(0)
    torch.testing.assert_close(model(x), x @ (W0 + mean).T)


def test_zero_b_is_the_base_bit_for_bit():
    batch = padded_batch([5, 9])
    expected = tiny_llama().eval()(**batch).logits
    model = get_peft_model(tiny_llama(), LoraMoeConfig())
    assert torch.equal(model.eval()(**batch).logits, expected)
    assert torch.equal(model.train()(**batch).logits, expected)


def test_loss_of_the_model_is_the_closed_form_at_a_zero_router():
    model = adapted_linear(config(expert_groups=[1, 1, 0, 0], localized_balancing_delta=0.3, router_aux_loss_coef=0.5))
    torch.nn.init.zeros_(parts_of(model)[0])
    model(torch.randn(3, 5, 7, dtype=torch.float64), task_type=torch.tensor([0, 1, 1]))
    n = 3 * 4
    assert float(router_loss(model).detach()) == pytest.approx(0.5 * 0.3**2 * n / (n - 1), rel=1e-6)


def test_every_routed_layer_adds_one_loss_term():
    model = get_peft_model(tiny_llama(), config(expert_groups=[1, 1, 0, 0], localized_balancing_delta=0.3)).double()
    for module in model.modules():
        if hasattr(module, "loramoe_router"):
            torch.nn.init.zeros_(module.router["default"].weight)
    model.train()(**padded_batch([5, 9]), task_type=torch.tensor([0, 1]))
    assert float(router_loss(model).detach()) == pytest.approx(6 * 0.1 * 0.3**2 * 8 / 7, rel=1e-6)


def test_training_on_the_loss_alone_gives_each_group_the_closed_form_share():
    model = adapted_linear(config(expert_groups=[1, 1, 0, 0], localized_balancing_delta=0.5, router_aux_loss_coef=1.0))
    Wg = parts_of(model)[0]
    x = torch.eye(7, dtype=torch.float64)[[0, 1]].view(2, 1, 7)
    optimizer = torch.optim.Adam([Wg], lr=0.02)
    for _ in range(400):
        optimizer.zero_grad()
        (0.0 * model(x, task_type=torch.tensor([0, 1])).sum()).backward()
        optimizer.step()
    gates = (x.squeeze(1) @ Wg.T).softmax(-1)
    own, others = torch.stack([gates[0, 2:], gates[1, :2]]), torch.stack([gates[0, :2], gates[1, 2:]])
    assert (own.mean() / others.mean()).item() == pytest.approx(0.5 / 1.5, rel=1e-2)


def test_one_dropout_mask_serves_all_experts():
    model = adapted_linear(config(lora_dropout=0.5, router_aux_loss_coef=0.0))
    Wg, A, B, W0 = parts_of(model)
    x = torch.randn(13, 7, dtype=torch.float64)
    torch.manual_seed(5)
    actual = model(x)
    torch.manual_seed(5)
    dropped = torch.nn.functional.dropout(x, 0.5)
    gates = (x @ Wg.T).softmax(-1)
    delta = sum(gates[:, e : e + 1] * (dropped @ A[e].T @ B[e]) for e in range(4))
    torch.testing.assert_close(actual, x @ W0.T + 2.0 * delta)


def test_defaults_are_the_papers():
    own = LoraMoeConfig()
    assert (own.num_experts, own.r, own.lora_alpha, own.lora_dropout) == (6, 4, 32, 0.05)
    assert (own.router, own.router_aux_loss_coef, own.localized_balancing_delta) == ("dense", 0.1, 0.1)
    places = {place.name.rpartition(".")[2] for place in describe(tiny_llama(), own).places}
    assert places == {"gate_proj", "up_proj", "down_proj"}
