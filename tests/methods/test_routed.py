"""The general type: any router with any losses, and the named methods as its presets."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from moe_peft import LoraMoeConfig, MoePeftWarning, RoutedConfig, SiraConfig, describe, router_loss
from moe_peft.forward.objective import router_loss_values
from moe_peft.methods import METHODS
from tests import reference
from tests.compare import assert_same
from tests.contract.cases import randomize
from tests.perft_models import perft_model, sparse_model
from tests.tiny import adapted_linear, padded_batch, routed_layer_of, tiny_llama


def config(**fields):
    return RoutedConfig(**{"num_experts": 4, "r": 3, "lora_alpha": 6, "router_aux_loss_coef": 0.0, **fields})


def parts_of(model):
    layer = routed_layer_of(model)
    experts = layer.experts["default"]
    return layer.router["default"].weight, experts.A, experts.B, layer.get_base_layer().weight


@pytest.mark.parametrize("implementation", ["eager", "dense"])
@pytest.mark.parametrize("num_tokens", [0, 1, 13])
@pytest.mark.parametrize(("router", "top_k"), [("dense", None), ("top_k", 1), ("top_k", 3), ("capacity", 2)])
@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_layer_equals_the_formula(implementation, num_tokens, router, top_k, factor):
    model = adapted_linear(
        config(router=router, top_k=top_k, routed_scaling_factor=factor, experts_implementation=implementation)
    )
    x = torch.randn(num_tokens, 7, dtype=torch.float64, requires_grad=True)
    Wg, A, B, W0 = parts_of(model)
    probs = reference.router_probs(x, Wg)
    if top_k is None:
        gates = [{e: factor * g for e, g in row.items()} for row in reference.dense_gates(probs)]
    else:
        gates, _ = reference.top_k_gates(probs, top_k, factor=factor)
    expected = reference.routed_layer(x, W0, A, B.mT, gates, scaling=2.0)
    assert_same(model(x), expected, [x, Wg, A, B], [x, Wg, A, B])


def test_normalised_top_k_layer_equals_the_formula():
    model = adapted_linear(config(top_k=2, norm_topk_prob=True))
    x = torch.randn(13, 7, dtype=torch.float64, requires_grad=True)
    Wg, A, B, W0 = parts_of(model)
    gates, _ = reference.top_k_gates(reference.router_probs(x, Wg), 2, normalise=True)
    expected = reference.routed_layer(x, W0, A, B.mT, gates, scaling=2.0)
    assert_same(model(x), expected, [x, Wg, A, B], [x, Wg, A, B])


@pytest.mark.parametrize("router", ["dense", "top_k", "capacity"])
def test_jitter_moves_the_scores_of_training_alone(router):
    noisy = adapted_linear(config(router=router, router_jitter_noise=0.2))
    plain = adapted_linear(config(router=router))
    x = torch.randn(13, 7, dtype=torch.float64)
    assert not torch.equal(noisy(x), plain(x))
    assert torch.equal(noisy.eval()(x), plain.eval()(x))


def losses_of(model, *batch, **columns):
    torch.manual_seed(4)
    out = model(*batch, **columns)
    out.square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    return out, float(router_loss(model).detach()), grads


def assert_equal_presets(one, other, *batch, **columns):
    for got, wanted in zip(losses_of(one, *batch, **columns), losses_of(other, *batch, **columns), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)


def test_dense_router_with_localized_balancing_is_loramoe():
    groups = {"expert_groups": [1, 1, 0, 0], "localized_balancing_delta": 0.3}
    ours = config(router="dense", losses={"localized_balancing": 0.1}, **groups)
    method = LoraMoeConfig(num_experts=4, r=3, lora_alpha=6, lora_dropout=0.0, **groups)
    x = torch.randn(2, 6, 7, dtype=torch.float64)
    assert_equal_presets(adapted_linear(ours), adapted_linear(method), x, task_type=torch.tensor([0, 1]))


def test_capacity_router_with_gshard_loss_is_sira():
    shared = {"num_experts": 4, "r": 3, "lora_alpha": 6, "top_k": 2, "capacity_factor": 0.5, "expert_dropout": 0.2}
    ours = RoutedConfig(router="capacity", router_aux_loss_coef=0.0, losses={"gshard_load_balancing": 0.05}, **shared)
    method = SiraConfig(router_aux_loss_coef=0.05, **shared)
    assert_equal_presets(adapted_linear(ours), adapted_linear(method), torch.randn(2, 6, 7, dtype=torch.float64))


@pytest.mark.parametrize(
    ("router", "name"), [("dense", "importance"), ("top_k", "load_balancing"), ("capacity", "load_balancing")]
)
def test_balance_loss_follows_from_the_router(router, name):
    model = adapted_linear(config(router=router, router_aux_loss_coef=0.5, router_z_loss_coef=0.25))
    model(torch.randn(13, 7, dtype=torch.float64))
    values = router_loss_values(model)
    assert set(values) == {name, "z_loss"}
    expected = 0.5 * values[name] + 0.25 * values["z_loss"]
    torch.testing.assert_close(router_loss(model).detach(), expected)


def test_losses_of_weight_zero_are_not_computed():
    model = adapted_linear(config(losses={"z_loss": 0.0, "importance": 0.1}))
    model(torch.randn(13, 7, dtype=torch.float64))
    assert set(router_loss_values(model)) == {"importance"}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({"router": "dense"}, None), ({}, 2), ({"num_experts": 1}, 1), ({"router": "capacity"}, 2), ({"top_k": 3}, 3)],
)
def test_top_k_defaults_to_two_with_a_sparse_router(fields, expected):
    assert config(**fields).top_k == expected


def test_methods_are_listed_by_name():
    assert {name: cls.adapter_type.lower() for name, cls in METHODS.items()} == {name: name for name in METHODS}


@pytest.mark.parametrize(
    ("build", "wraps", "expected"),
    [
        (tiny_llama, "block", ["model.layers.0.mlp", "model.layers.1.mlp"]),
        (lambda: sparse_model("olmoe"), "block", ["model.layers.0.mlp", "model.layers.1.mlp"]),
        (lambda: sparse_model("olmoe"), "experts", ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]),
    ],
)
def test_wraps_says_what_the_adapter_stands_beside(build, wraps, expected):
    assert [place.name for place in describe(build(), config(wraps=wraps)).places] == expected


@pytest.mark.parametrize("router", ["dense", "top_k", "constant"])
def test_around_a_block_it_is_perft(router):
    fields = {"num_experts": 4, "router_aux_loss_coef": 0.0}
    variant = "D" if router == "constant" else "R"
    model = get_peft_model(sparse_model("olmoe", torch.float64), config(router=router, wraps="block"))
    randomize(model)
    method = perft_model("olmoe", variant, **fields, **({} if router == "constant" else {"router": router}))
    batch = padded_batch([9, 6])
    found, expected = model.double().eval()(**batch).logits, method(**batch).logits
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"wraps": "model"}, "wraps='model' must be one of 'linear', 'block', 'experts'"),
        ({"router": "backbone"}, "only adapters around the backbone's experts follow its routing"),
        (
            {"router": "backbone", "wraps": "experts", "num_experts": 4},
            "there is one expert for each of the backbone's",
        ),
        (
            {"num_experts": 2, "expert_groups": [0, 1], "losses": {"z_loss": 0.1}},
            r"expert_groups=\[0, 1\] must be None without the loss that reads it; set its weight",
        ),
        ({"activation": "relu"}, "activation='relu' must be left at 'silu': the kind 'low_rank' has none"),
        (
            {"experts": "bottleneck", "lora_alpha": 64},
            "lora_alpha=64 must be left at None: the kind 'bottleneck' has no sc",
        ),
        (
            {"experts": "bottleneck", "use_rslora": True},
            "use_rslora=True must be left at False: the kind 'bottleneck'",
        ),
        (
            {"experts": "shared_down", "experts_implementation": "eager"},
            "experts_implementation='eager' must be left at 'auto': the kind 'shared_down' does not use it",
        ),
        ({"router": "constant", "losses": {"z_loss": 0.1}}, "the 'constant' router learns nothing"),
        ({"router": "constant", "router_z_loss_coef": 0.1}, "the 'constant' router learns nothing"),
    ],
)
def test_settings_without_meaning_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RoutedConfig(**fields)


@pytest.mark.parametrize("config_cls", [RoutedConfig, SiraConfig])
def test_a_single_renormalised_choice_warns(config_cls):
    with pytest.warns(MoePeftWarning, match=f"^{config_cls.__name__}: with top_k=1, norm_topk_prob=True makes"):
        config_cls(num_experts=4, top_k=1, norm_topk_prob=True)
    config_cls(num_experts=4, top_k=2, norm_topk_prob=True)
    config_cls(num_experts=1, top_k=1, norm_topk_prob=True)  # nothing to choose, so nothing to learn
