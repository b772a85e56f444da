"""Life of experts' copies on one model: switching, merging, disabling, what each step and each slot gives them."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig

from moe_peft import EsftConfig, MoePeftWarning, PerftConfig, RoutedConfig, telemetry
from moe_peft.layers import SlicedExperts
from tests.methods.esft_models import (
    IMPLEMENTATIONS,
    experts_modules,
    first_layer,
    frozen_and_adapted,
    logits,
    sparse_model,
    token_batch,
)

OTHER = {"0": [0, 2], "1": [5]}


def replaced(base, model, adapters=("default",)):
    """The base model with the copies written over its experts by hand."""
    twin = copy.deepcopy(base)
    layers = [module for module in model.modules() if isinstance(module, SlicedExperts)]
    for module, layer in zip(experts_modules(twin), layers, strict=True):
        for adapter in adapters:
            for name, parameter in layer.experts[adapter].named_parameters():
                getattr(module, name).data[list(layer.selections[adapter])] = parameter.data
    return twin


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["olmoe", "gpt_oss", "nemotron_h"])
def test_output_is_that_of_a_model_whose_experts_are_replaced(kind, implementation):
    base, model = frozen_and_adapted(kind, implementation)
    expected = logits(replaced(base, model))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, logits(base), atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))


def test_adapters_switch_and_are_deleted_and_disjoint_ones_act_together(tmp_path):
    base, model = frozen_and_adapted()
    model.save_pretrained(tmp_path)
    first = logits(model)
    model.add_adapter("other", EsftConfig(experts=OTHER))
    copies = dict(first_layer(model).experts["other"].named_parameters())
    for name, tensor in experts_modules(base)[0].named_parameters():
        assert torch.equal(copies[name], tensor[OTHER["0"]])
    for name, parameter in model.named_parameters():
        if ".other." in name:
            parameter.data *= 1.5
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    torch.testing.assert_close(logits(model), logits(replaced(base, model, ["other"])), rtol=1e-4, atol=1e-4)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    torch.testing.assert_close(both, logits(replaced(base, model, ["default", "other"])), rtol=1e-4, atol=1e-4)
    model(**token_batch()).loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "_experts." in n)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(merged), both, rtol=1e-4, atol=1e-4)

    model.delete_adapter("other")
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.load_adapter(tmp_path, "again")
    model.set_adapter("again")
    assert torch.equal(logits(model), first)


def test_active_adapters_that_replace_one_expert_twice_are_refused():
    _, model = frozen_and_adapted()
    model.add_adapter("other", EsftConfig(experts={"0": [3, 5], "1": [1]}))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"both replace the experts \[3\] of model.layers.0.mlp.experts"):
        logits(model)
    with pytest.raises(ValueError, match=r"both replace the experts \[3\]"):
        model.merge_and_unload()


def test_an_adapter_of_another_kind_cannot_share_a_module():
    _, model = frozen_and_adapted()
    expected = logits(model)
    with pytest.raises(ValueError, match=r"has an adapter of another kind.*model of its own"):
        model.add_adapter("other", EsftConfig(experts={"1": [3]}, expert_adapter="lora"))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), expected)


OTHER_TYPES = {
    "perft": lambda: PerftConfig(variant="E", r=2),
    "routed": lambda: RoutedConfig(wraps="experts", num_experts=2, r=2),
    "lora": lambda: LoraConfig(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], r=2),
}


@pytest.mark.parametrize(("first", "second"), [*((name, "esft") for name in OTHER_TYPES), ("esft", "perft")])
def test_copies_and_adapters_of_another_type_do_not_wrap_one_another(first, second):
    configs = {"esft": lambda: EsftConfig(experts=OTHER), **OTHER_TYPES}
    model = sparse_model("olmoe")
    model.add_adapter(configs[first](), "first")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts has an adapter of another type.*model of its own"):
        model.add_adapter(configs[second](), "second")
    after = model.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("kind", ["olmoe", "gpt_oss"])
def test_merging_is_index_assignment_and_unmerging_restores_every_bit(kind):
    base, model = frozen_and_adapted(kind)
    before = logits(model)
    model.merge_adapter()
    wanted = dict(replaced(base, model).named_parameters())
    for name, parameter in model.base_model.model.named_parameters():
        if "esft" not in name:
            assert torch.equal(parameter, wanted[name.replace("base_layer.", "")]), name
    assert torch.equal(logits(model), logits(replaced(base, model)))
    model.unmerge_adapter()
    for name, parameter in base.named_parameters():
        found = model.base_model.model.get_parameter(name.replace("mlp.experts.", "mlp.experts.base_layer."))
        assert torch.equal(found, parameter), name
    assert torch.equal(logits(model), before)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    assert torch.equal(logits(model), before)


def test_a_new_adapter_copies_the_backbones_experts_not_merged_ones():
    base, model = frozen_and_adapted()
    model.merge_adapter()
    with pytest.warns(MoePeftWarning, match="a new one copies its experts from. Unmerging"):
        model.add_adapter("other", EsftConfig(experts={"0": [1, 2], "1": [2, 7]}))
    model.set_adapter("other")
    for name, tensor in experts_modules(base)[0].named_parameters():
        assert torch.equal(first_layer(model).experts["other"].get_parameter(name), tensor[[1, 2]])
    torch.testing.assert_close(logits(model), logits(base), rtol=1e-5, atol=1e-5)


def test_copies_that_are_not_finite_are_not_merged():
    base, model = frozen_and_adapted()
    first_layer(model).experts["default"].down_proj.data[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="The adapter default seems to be broken"):
        model.merge_and_unload(safe_merge=True)
    assert torch.equal(first_layer(model).base_layer.down_proj, experts_modules(base)[0].down_proj)


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("reason", ["overlap", "not finite"])
def test_a_merge_that_the_last_layer_refuses_changes_no_other(method, reason):
    _, model = frozen_and_adapted()
    model.add_adapter("other", EsftConfig(experts={"0": [0], "1": [2]}))
    layers = [module for module in model.modules() if isinstance(module, SlicedExperts)]
    if reason == "overlap":
        arguments, message = {"adapter_names": ["default", "other"]}, r"both replace the experts \[2\]"
    else:
        arguments, message = {"safe_merge": True}, "seems to be broken"
        layers[1].experts["default"].down_proj.data[0, 0, 0] = float("nan")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        getattr(model, method)(**arguments)
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name].nan_to_num(), tensor.nan_to_num()) for name, tensor in state.items())
    assert not any(layer.merged for layer in layers)
    model.merge_adapter(["other"])
    assert [layer.merged_adapters for layer in layers] == [["other"], ["other"]]


def test_one_model_serves_one_adapter_at_a_time():
    _, model = frozen_and_adapted()
    with pytest.raises(ValueError, match="cannot be mixed in a batch"):
        model(**token_batch(), adapter_names=["default", "__base__", "default"])


def test_slots_without_an_expert_stay_without_one():
    _, model = frozen_and_adapted()
    layer = first_layer(model)
    generator = torch.Generator().manual_seed(0)
    hidden, weights = torch.randn(5, 32, generator=generator), torch.rand(5, 3, generator=generator)
    index = torch.tensor([[1, 8, 0], [8, 8, 8], [3, 6, 8], [2, 4, 8], [8, 1, 3]])
    expected = layer(hidden, index.masked_fill(index == 8, 0), weights.masked_fill(index == 8, 0.0))
    torch.testing.assert_close(layer(hidden, index, weights), expected, rtol=1e-5, atol=1e-6)
    assert not layer(hidden, index, weights)[1].any()


def test_every_copy_gets_a_gradient_in_a_step_that_sends_nothing_there():
    _, model = frozen_and_adapted()
    used = set()
    first_layer(model).base_layer.register_forward_pre_hook(lambda _, args: used.update(args[1].flatten().tolist()))
    batch = token_batch(rows=1, length=2)
    model(**batch)
    unused = sorted(set(range(8)) - used)
    model.add_adapter("unused", EsftConfig(experts={"0": unused}))
    model.set_adapter("unused")
    model(**batch).loss.backward()
    gradients = [p.grad for n, p in model.named_parameters() if ".unused." in n]
    assert unused and len(gradients) == 2
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_the_routing_of_the_backbone_is_what_the_layer_reports():
    base, model = frozen_and_adapted(experts={"1": [2]})
    seen = []
    experts_modules(base)[1].register_forward_pre_hook(lambda module, args: seen.append(args))
    with telemetry.record(model) as routings:
        logits(model)
    logits(base)
    ((_, index, weights),) = seen
    (routing,) = routings["model.layers.1.mlp.experts"]
    assert torch.equal(routing.experts, index) and torch.equal(routing.weights, weights)
    assert routing.num_experts == 8
