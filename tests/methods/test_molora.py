"""MoLORA as a layer of a model: its formula, and its relations to LoRA and LoRAMoE."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from moe_peft import LoraMoeConfig, MoloraConfig, describe, router_loss
from moe_peft.forward.tracker import find_tracker
from tests import reference
from tests.compare import assert_same
from tests.tiny import OneLinear, adapted_linear, padded_batch, routed_layer_of, tiny_llama


def config(**fields):
    return MoloraConfig(**{"num_experts": 4, "r": 3, "lora_alpha": 6, **fields})


def parts_of(model):
    layer = routed_layer_of(model)
    experts = layer.experts["default"]
    return layer.router["default"].weight, experts.A, experts.B, layer.get_base_layer().weight


@pytest.mark.parametrize("implementation", ["eager", "dense"])
@pytest.mark.parametrize("num_tokens", [0, 1, 13, 63])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, None), (4, None), (4, 1), (4, 2), (4, 4)])
def test_layer_equals_the_formula(implementation, num_tokens, num_experts, top_k):
    fields = {"num_experts": num_experts, "top_k": top_k, "experts_implementation": implementation}
    model = adapted_linear(config(**fields))
    x = torch.randn(num_tokens, 7, dtype=torch.float64, requires_grad=True)
    Wg, A, B, W0 = parts_of(model)
    expected = reference.molora_layer(x, W0, Wg, A, B.mT, lora_alpha=6, top_k=top_k)
    assert_same(model(x), expected, [x, Wg, A, B], [x, Wg, A, B])


def test_equals_loramoe_with_equal_weights():
    molora = adapted_linear(config())
    loramoe = adapted_linear(
        LoraMoeConfig(num_experts=4, r=3, lora_alpha=6, lora_dropout=0.0, router_aux_loss_coef=0.0)
    )
    with torch.no_grad():
        for own, other in zip(parts_of(loramoe), parts_of(molora), strict=True):
            own.copy_(other)
    x = torch.randn(13, 7, dtype=torch.float64)
    assert torch.equal(molora(x), loramoe(x))


def test_one_expert_equals_plain_lora():
    ours = adapted_linear(config(num_experts=1))
    stock = get_peft_model(OneLinear(7, 5), LoraConfig(r=3, lora_alpha=6, target_modules=["linear"])).double()
    _, A, B, _ = parts_of(ours)
    layer = stock.base_model.model.linear
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(A[0])
        layer.lora_B["default"].weight.copy_(B[0].T)
    x = torch.randn(13, 7, dtype=torch.float64)
    torch.testing.assert_close(ours(x), stock(x))
    assert not torch.allclose(ours(x), stock.base_model.model.linear.base_layer(x))


def test_zero_router_gives_mean_delta():
    model = adapted_linear(config())
    Wg, A, B, W0 = parts_of(model)
    torch.nn.init.zeros_(Wg)
    x = torch.randn(13, 7, dtype=torch.float64)
    mean = 2.0 * torch.stack([B[e].T @ A[e] for e in range(4)]).mean(0)
    torch.testing.assert_close(model(x), x @ (W0 + mean).T)


def test_mixture_of_outputs_is_the_mixture_of_delta_weights():
    model = adapted_linear(config())
    Wg, A, B, W0 = parts_of(model)
    x = torch.randn(13, 7, dtype=torch.float64)
    for t, gates in enumerate((x @ Wg.T).softmax(-1)):
        delta = sum(2.0 * gates[e] * B[e].T @ A[e] for e in range(4))
        torch.testing.assert_close(model(x)[t], (W0 + delta) @ x[t])


def test_permuting_tokens_permutes_outputs():
    model = adapted_linear(config(top_k=2))
    x = torch.randn(13, 7, dtype=torch.float64)
    order = torch.randperm(13)
    torch.testing.assert_close(model(x[order]), model(x)[order])


def test_top_k_switches_the_router_and_changes_the_output():
    assert MoloraConfig().router == "dense" and MoloraConfig(top_k=2).router == "top_k"
    soft, sparse = adapted_linear(config()), adapted_linear(config(top_k=2))
    x = torch.randn(13, 7, dtype=torch.float64)
    assert torch.equal(parts_of(soft)[1], parts_of(sparse)[1]) and not torch.allclose(soft(x), sparse(x))


def test_capacity_router_is_refused():
    with pytest.raises(ValueError, match="router='capacity' must be one of 'dense', 'top_k'"):
        MoloraConfig(router="capacity", top_k=2)


def test_fresh_adapter_is_the_base_bit_for_bit():
    batch = padded_batch([5, 9])
    expected = tiny_llama().eval()(**batch).logits
    assert torch.equal(get_peft_model(tiny_llama(), MoloraConfig()).train()(**batch).logits, expected)


def test_router_and_a_start_normal_with_two_hundredths():
    model = get_peft_model(OneLinear(400, 5), MoloraConfig(num_experts=20, r=16, target_modules=["linear"]))
    Wg, A, B, _ = parts_of(model)
    assert abs(float(Wg.std()) - 0.02) < 0.001 and abs(float(A.std()) - 0.02) < 0.001 and B.eq(0).all()


def test_there_is_no_router_loss_by_default():
    model = adapted_linear(config())
    model(torch.randn(13, 7, dtype=torch.float64))
    assert router_loss(model) == 0 and not find_tracker(model).latest.layers


def test_defaults_are_the_released_recipes():
    own = MoloraConfig()
    assert (own.num_experts, own.r, own.lora_alpha, own.lora_dropout) == (10, 4, 16, 0.0)
    places = {place.name.rpartition(".")[2] for place in describe(tiny_llama(), own).places}
    assert places == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"}
