"""Wrong values are refused with the value and the way out; parameter counts follow from the fields."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from moe_peft import LoraMoeConfig, MoloraConfig, RoutedConfig, SiraConfig, describe
from tests.adapter_types import ROUTED_SUMS
from tests.tiny import tiny_llama


@pytest.mark.parametrize("config", ROUTED_SUMS)
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_experts", 0, "num_experts=0 must be at least 1"),
        ("r", 0, "r=0 must be a rank of at least 1"),
        ("lora_alpha", 0, "lora_alpha=0 must be a positive number"),
        ("lora_dropout", 1.0, "lora_dropout=1.0 must be a number from 0 up to, but not including, 1"),
        ("expert_dropout", -0.1, "expert_dropout=-0.1 must be a number from 0"),
        ("router_jitter_noise", 1.5, "router_jitter_noise=1.5 must be a number from 0"),
        ("router_aux_loss_coef", -0.1, "router_aux_loss_coef=-0.1 must be zero or a positive number"),
        ("router_z_loss_coef", -1, "router_z_loss_coef=-1 must be zero or a positive number"),
        ("routed_scaling_factor", 0, "routed_scaling_factor=0 must be a positive number"),
        ("experts_implementation", "fast", "experts_implementation='fast' must be one of 'auto', 'eager', 'dense'"),
        ("init_weights", "zero", "init_weights='zero' must be one of True, False, 'gaussian'"),
        ("target_parameters", ["w"], "experts are adapted as modules; name the modules in target_modules"),
        ("schema_version", 99, "schema_version=99 must be at most 1; upgrade peft-moe"),
    ],
)
def test_wrong_value_is_refused_with_the_value_and_the_fix(config, field, value, message):
    with pytest.raises(ValueError, match=f"^{config.__name__}: .*{message}") as error:
        config(**{field: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("capacity_factor", 0.0, "capacity_factor=0.0 must be a positive number or None"),
        ("capacity_factor", 1e300, "capacity_factor=1e[+]300 must be a positive number or None, at most 1e[+]06"),
        ("capacity_order", "random", "capacity_order='random' must be one of 'position', 'choice'"),
    ],
)
def test_wrong_capacity_is_refused(field, value, message):
    for config in (SiraConfig(), RoutedConfig(router="capacity")):
        with pytest.raises(ValueError, match=message):
            type(config)(router="capacity", **{field: value})


@pytest.mark.parametrize("config", [RoutedConfig, MoloraConfig])
def test_unknown_router_is_refused(config):
    with pytest.raises(ValueError, match="router='hash' must be one of 'dense', 'top_k'"):
        config(router="hash")


@pytest.mark.parametrize(
    ("config", "router", "reason"),
    [(LoraMoeConfig, "top_k", "LoRAMoE routes densely"), (SiraConfig, "top_k", "SiRA routes with a capacity")],
)
def test_method_with_a_router_of_its_own_refuses_another(config, router, reason):
    with pytest.raises(ValueError, match=reason):
        config(router=router, top_k=2)


def test_foreign_peft_type_is_refused():
    with pytest.raises(ValueError, match="does not belong to LoraMoeConfig, which is of type 'LORAMOE'"):
        LoraMoeConfig(peft_type="SIRA")


def test_choice_order_is_refused_for_a_causal_model_unless_allowed():
    fields = {"capacity_order": "choice", "task_type": "CAUSAL_LM"}
    with pytest.raises(ValueError, match=r"'position' for a causal language model.*allow_non_causal=True"):
        SiraConfig(**fields)
    assert SiraConfig(**fields, allow_non_causal=True).capacity_order == "choice"
    assert SiraConfig(capacity_order="choice", task_type="SEQ_CLS").capacity_order == "choice"


@pytest.mark.parametrize("name", ["load_balancing", "gshard_load_balancing"])
def test_load_balancing_of_a_dense_router_is_refused(name):
    with pytest.raises(ValueError, match=f"without '{name}' for the dense router.*use 'importance'"):
        RoutedConfig(router="dense", losses={name: 0.1})


@pytest.mark.parametrize(
    ("router", "name", "field"),
    [
        ("top_k", "load_balancing", "router_aux_loss_coef"),
        ("dense", "importance", "router_aux_loss_coef"),
        ("top_k", "z_loss", "router_z_loss_coef"),
    ],
)
def test_same_loss_in_two_fields_is_refused(router, name, field):
    with pytest.raises(ValueError, match=f"without '{name}' while {field} sets its weight too; set {field}=0.0"):
        RoutedConfig(router=router, losses={name: 0.1}, **{field: 0.2})
    assert RoutedConfig(router=router, losses={name: 0.1}, **{field: 0.0}).losses == {name: 0.1}


@pytest.mark.parametrize(
    ("losses", "message"),
    [({"entropy": 0.1}, "names out of 'load_balancing'"), ({"importance": -1}, "weights that are zero or positive")],
)
def test_wrong_losses_are_refused(losses, message):
    with pytest.raises(ValueError, match=message):
        RoutedConfig(losses=losses)


def test_unknown_experts_are_refused():
    with pytest.raises(ValueError, match="experts='dense_ffn' must be one of 'low_rank'"):
        RoutedConfig(experts="dense_ffn")


@pytest.mark.parametrize(("use_rslora", "expected"), [(False, 8.0), (True, 16.0)])
def test_scaling_is_alpha_over_r_or_its_root(use_rslora, expected):
    assert LoraMoeConfig(r=4, lora_alpha=32, use_rslora=use_rslora).scaling == expected


@pytest.mark.parametrize("config", ROUTED_SUMS)
def test_parameters_of_a_layer_are_n_r_times_both_widths_plus_n_times_the_input(config):
    described = describe(tiny_llama(), config(num_experts=5, r=3, target_modules=["down_proj", "q_proj"]))
    assert len(described.places) == 4
    for place, count in zip(described.places, described.parameters, strict=True):
        assert count == 5 * 3 * (place.in_features + place.out_features) + 5 * place.in_features


@pytest.mark.parametrize("config", ROUTED_SUMS)
def test_described_parameters_are_those_that_train(config):
    fields = {"num_experts": 5, "r": 3}
    described = describe(tiny_llama(), config(**fields))
    model = get_peft_model(tiny_llama(), config(**fields))
    trainable = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert sum(trainable.values()) == described.num_parameters == sum(described.parameters)
    assert described.base_parameters == sum(p.numel() for p in tiny_llama().parameters())


@pytest.mark.parametrize(("num_experts", "total"), [(6, 38_486_016), (8, 51_314_688)])
def test_loramoe_on_llama_2_7b_trains_the_known_number_of_parameters(num_experts, total):
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    described = describe(model, LoraMoeConfig(num_experts=num_experts, r=4))
    assert described.num_parameters == total
    assert len(described.places) == 96
    assert described.base_parameters == 6_738_415_616
    assert f"96 places, {total:,} trainable parameters" in str(described)


@pytest.mark.parametrize("tokens", [{5, 3}, [3, 5], (3, 5), {"embed_tokens": {5, 3}}, {"model.embed_tokens": (3, 5)}])
def test_token_ids_may_be_given_in_any_container(tokens):
    config = RoutedConfig(num_experts=2, trainable_token_indices=tokens)
    model = get_peft_model(tiny_llama(), config)
    (wrapper,) = [module for module in model.modules() if hasattr(module, "token_adapter")]
    assert wrapper.token_adapter.token_indices["default"] == [3, 5]
    assert torch.isfinite(model(torch.tensor([[3, 4, 5]])).logits).all()
