"""Merging: exact for what stays active, all layers or none, and refused where no weight equals an adapter."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrize

from moe_peft import EsftConfig, MovConfig, PerftConfig, RoutedConfig
from moe_peft.layers import RoutedLayer
from moe_peft.routers import DenseRouter
from moe_peft.tuner.merging import merge_layers, plan_merges
from tests.contract.cases import randomize, tiny_olmoe
from tests.tiny import padded_batch, tiny_gpt2, tiny_llama

BATCH = padded_batch([9, 6])
ONE = {"num_experts": 1, "router": "dense", "router_aux_loss_coef": 0.0, "r": 2}
SINGLE = {
    "one expert": (tiny_llama, lambda: RoutedConfig(**ONE)),
    "one expert, Conv1D": (tiny_gpt2, lambda: RoutedConfig(**ONE)),
    "constant router": (tiny_llama, lambda: RoutedConfig(router="constant", num_experts=3, r=2)),
    "one vector": (tiny_llama, lambda: MovConfig(num_experts=1)),
    "one vector by token, Conv1D": (tiny_gpt2, lambda: MovConfig(num_experts=1, router_granularity="token")),
    "one vector, read by its router": (tiny_llama, lambda: MovConfig(num_experts=1, router_input="hidden")),
    "matrices of experts": (tiny_olmoe, lambda: EsftConfig(experts={"0": [0, 3], "1": [1]})),
}
PARTNERS = {
    "one expert": lambda: RoutedConfig(num_experts=3, r=2),
    "one expert, Conv1D": lambda: RoutedConfig(num_experts=3, r=2, experts="bottleneck"),
    "constant router": lambda: RoutedConfig(num_experts=3, r=2),
    "one vector": lambda: MovConfig(num_experts=3),
    "one vector by token, Conv1D": lambda: MovConfig(num_experts=3),
    "one vector, read by its router": lambda: MovConfig(num_experts=3, router_input="hidden"),
    "matrices of experts": lambda: EsftConfig(experts={"0": [1], "1": [0, 2]}),
}


def two_adapters(kind: str, double: bool = True) -> nn.Module:
    """A model with a mergeable adapter `a` and another one `b` of the same type, both random and active."""
    build, config = SINGLE[kind]
    model = get_peft_model(build(), config(), adapter_name="a")
    model.add_adapter("b", PARTNERS[kind]())
    randomize(model)
    model.base_model.set_adapter(["a", "b"])
    return (model.double() if double else model).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**BATCH).logits


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name].nan_to_num(), tensor.nan_to_num()) for name, tensor in state.items())
    assert not any(layer.merged for layer in model.modules() if isinstance(layer, RoutedLayer))


@pytest.mark.parametrize("kind", SINGLE)
def test_merging_one_of_two_active_adapters_leaves_the_other_one_exact(kind):
    model = two_adapters(kind)
    both = logits(model)
    model.base_model.set_adapter(["a"])
    alone = logits(model)
    assert not torch.allclose(both, alone, atol=1e-3)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), alone)
    model.base_model.set_adapter(["a", "b"])
    torch.testing.assert_close(logits(model), both)
    with model.disable_adapter():
        plain = logits(model)
    torch.testing.assert_close(plain, logits(SINGLE[kind][0]().double().eval()))
    torch.testing.assert_close(logits(model), both)
    model.merge_adapter(["a"], safe_merge=True)
    torch.testing.assert_close(logits(model), both)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), plain)
    torch.testing.assert_close(logits(model), both)
    model.merge_adapter(["a"])
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("a")
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), both)
    model.delete_adapter("b")
    model.base_model.set_adapter(["a"])
    torch.testing.assert_close(logits(model.merge_and_unload()), alone)


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("kind", SINGLE)
def test_a_safe_merge_that_the_last_layer_refuses_changes_nothing(kind, method):
    model = two_adapters(kind)
    layers = [layer for layer in model.modules() if isinstance(layer, RoutedLayer) and "a" in layer.experts]
    next(layers[-1].experts["a"].parameters()).data.view(-1)[0] = float("nan")
    state = state_of(model)
    with pytest.raises(ValueError, match="NaNs detected"):
        getattr(model, method)(adapter_names=["a"], safe_merge=True)
    assert_unchanged(model, state)
    next(layers[-1].experts["a"].parameters()).data.view(-1)[0] = 0.1
    model.merge_adapter(["a"])
    assert all(layer.merged_adapters == ["a"] for layer in layers)


def test_an_adapter_merges_where_other_layers_hold_adapters_that_do_not():
    model = get_peft_model(
        tiny_llama(), RoutedConfig(router="constant", target_modules=["q_proj"], num_experts=3, r=2), adapter_name="a"
    )
    model.add_adapter("b", RoutedConfig(wraps="block", num_experts=3, r=2))
    randomize(model)
    model.base_model.set_adapter(["a", "b"])
    model.eval()
    both, state = logits(model), state_of(model)
    for names in (["b"], ["a", "b"], None):
        for method in ("merge_adapter", "merge_and_unload"):
            with pytest.raises(ValueError, match=r"'b' depends on the input of .*mlp.*cannot be merged"):
                getattr(model, method)(adapter_names=names)
            assert_unchanged(model, state)
    model.merge_adapter(["a"])
    torch.testing.assert_close(logits(model), both)


# As in peft, every layer where nothing was merged says so.
@pytest.mark.filterwarnings("default:Already unmerged:moe_peft.MoePeftWarning")
@pytest.mark.parametrize("other", ["lora", "b"])
def test_matrices_of_experts_merge_beside_another_adapter(other):
    model = get_peft_model(tiny_olmoe(), EsftConfig(experts={"0": [0, 3]}), adapter_name="a")
    if other == "b":
        model.add_adapter("b", EsftConfig(experts={"1": [2]}, expert_adapter="lora", r=2))
    else:
        lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(model.base_model.model, lora, adapter_name="lora")
    randomize(model)
    names = ["a", "b"] if other == "b" else ["a"]
    model.base_model.set_adapter(names)
    model.eval()
    both = logits(model)
    model.merge_adapter(["a"])
    torch.testing.assert_close(logits(model), both)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), both)


@pytest.mark.parametrize(
    "config",
    [lambda: RoutedConfig(**ONE, target_modules=["v_proj"]), lambda: MovConfig(num_experts=1)],
    ids=["adds", "scales"],
)
def test_types_that_wrap_one_another_merge_together_from_the_inside(config):
    stock = get_peft_model(tiny_llama(), LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(stock.base_model.model, config())
    randomize(model)
    model.double().eval()
    both = logits(model)
    layer = next(layer for layer in model.modules() if isinstance(layer, RoutedLayer) and "v_proj" in layer.place)
    if layer.adds_to_output:
        model.merge_adapter()
        torch.testing.assert_close(logits(model), both)
        model.unmerge_adapter()
    else:
        with pytest.raises(ValueError, match=r"changes what the adapter 'default' inside it gives"):
            model.merge_adapter()
    torch.testing.assert_close(logits(model), both)
    torch.testing.assert_close(logits(model.merge_and_unload()), both)


def test_a_failure_in_the_middle_of_a_merge_is_undone():
    model = two_adapters("one vector")
    layers = [layer for layer in model.modules() if isinstance(layer, RoutedLayer)]
    state = state_of(model)

    def fail(weight):
        raise KeyboardInterrupt

    layers[0].set_base_weight = fail
    for method in ("merge_adapter", "merge_and_unload"):
        with pytest.raises(KeyboardInterrupt):
            getattr(model, method)(adapter_names=["a"])
        assert_unchanged(model, state)
    plan = plan_merges(model, ["a"], "mov_", known=())
    with pytest.raises(KeyboardInterrupt):
        merge_layers(plan, safe_merge=False)
    assert_unchanged(model, state)


class SigmoidRouter(DenseRouter):
    """Weights of a sigmoid, which differ between inputs also where there is one expert."""

    mergeable = True

    def decide(self, logits_TE, context):
        routing = super().decide(logits_TE, context)
        return type(routing)(**{**vars(routing), "weights": logits_TE.sigmoid()})


def test_a_router_that_promises_too_much_is_found_out():
    model = get_peft_model(tiny_llama(), RoutedConfig(**ONE))
    layer = [layer for layer in model.modules() if isinstance(layer, RoutedLayer)][-1]
    layer.router["default"] = SigmoidRouter(layer.in_features, 1)
    randomize(model)
    state = state_of(model)
    for method in ("merge_adapter", "merge_and_unload"):
        with pytest.raises(ValueError, match=r"although its router \(SigmoidRouter\) says that it is mergeable"):
            getattr(model, method)()
        assert_unchanged(model, state)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ("a", TypeError, "should be a list of strings"),
        ([1], TypeError, "should be a list of strings"),
        (["a", "nobody"], ValueError, "there is no adapter 'nobody'. Adapters of this model are"),
    ],
)
def test_names_that_are_none_of_the_models_adapters_are_refused(names, error, message):
    model = two_adapters("one expert")
    state = state_of(model)
    for method in ("merge_adapter", "merge_and_unload"):
        with pytest.raises(error, match=message):
            getattr(model, method)(adapter_names=names)
        assert_unchanged(model, state)


def test_a_name_that_is_given_twice_is_merged_once():
    model = two_adapters("one expert")
    both = logits(model)
    model.merge_adapter(["a", "a"])
    torch.testing.assert_close(logits(model), both)


def test_weights_that_are_computed_or_shared_are_not_merged_into():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    base = tiny_llama()
    parametrize.register_parametrization(base.model.layers[1].mlp.down_proj, "weight", Doubled())
    shared = tiny_llama()
    shared.model.layers[1].mlp.down_proj.weight = shared.model.layers[0].mlp.down_proj.weight
    for build, message in ((base, "is computed from others in each call"), (shared, "shares a weight with another")):
        model = get_peft_model(build, RoutedConfig(**ONE, target_modules=["gate_proj", "1.mlp.down_proj"]))
        randomize(model)
        state = state_of(model)
        for method in ("merge_adapter", "merge_and_unload"):
            with pytest.raises(ValueError, match=message):
                getattr(model, method)()
            assert_unchanged(model, state)


def test_tokens_trained_beside_an_adapter_merge_with_it():
    model = get_peft_model(tiny_llama(), RoutedConfig(**ONE, trainable_token_indices=[3, 5]), adapter_name="a")
    model.add_adapter("b", RoutedConfig(num_experts=3, r=2))
    randomize(model)
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data += 0.3
    model.double().eval()
    model.base_model.set_adapter(["a", "b"])
    both, state = logits(model), state_of(model)
    model.merge_adapter(["a"])
    torch.testing.assert_close(logits(model), both)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), both)
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(["a"], safe_merge=True)
    assert not any(layer.merged for layer in model.modules() if isinstance(layer, RoutedLayer))
    weights = {name: tensor for name, tensor in state.items() if "base_layer" in name}
    for name, tensor in weights.items():
        torch.testing.assert_close(model.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("build", "config", "mergeable"),
    [
        *((build, config, True) for build, config in SINGLE.values()),
        (tiny_llama, lambda: RoutedConfig(num_experts=1), True),
        (tiny_llama, lambda: RoutedConfig(num_experts=3), False),
        (tiny_llama, lambda: RoutedConfig(**ONE, experts="bottleneck"), False),
        (tiny_llama, lambda: MovConfig(num_experts=2), False),
        (tiny_olmoe, lambda: PerftConfig(variant="S"), False),
        (tiny_olmoe, lambda: PerftConfig(variant="E"), False),
        (tiny_olmoe, lambda: PerftConfig(variant="R", num_experts=1, top_k=1), False),
        (tiny_olmoe, lambda: EsftConfig(experts={"0": [0]}, expert_adapter="lora"), False),
    ],
)
def test_the_configuration_says_whether_a_merge_will_succeed(build, config, mergeable):
    assert config().mergeable is mergeable
    model = get_peft_model(build(), config())
    randomize(model)
    model.eval()
    expected = logits(model)
    assert model.peft_config["default"].mergeable is mergeable
    if mergeable:
        torch.testing.assert_close(logits(copy.deepcopy(model).merge_and_unload()), expected, rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(ValueError, match="cannot be merged"):
            model.merge_and_unload()
