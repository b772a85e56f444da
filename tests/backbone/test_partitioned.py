"""Adapters see parameters that DeepSpeed has cut into parts as wholes, and read or change no part for a whole."""

from __future__ import annotations

import pytest
import torch
from peft import PeftConfig, get_peft_model
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from moe_peft import (
    EsftConfig,
    ExpertLoraConfig,
    MoloraConfig,
    MovConfig,
    PerftConfig,
    RoutedConfig,
    describe,
    routed_layers,
)
from moe_peft.backbone.expert_tensors import expert_tensors, keeps_slices
from moe_peft.backbone.partitioned import check_mergeable_here, gathered, is_partitioned, shape_of
from moe_peft.backbone.stand_in import stand_in_fault
from moe_peft.backbone.structure import find_moe_layers
from moe_peft.layers.router_norms import router_norms
from tests.contract.cases import tiny_olmoe
from tests.tiny import tiny_gpt2

CONFIGS = {
    "perft-r": PerftConfig(variant="R", r=2),
    "perft-e": PerftConfig(variant="E", r=2),
    "perft-d": PerftConfig(variant="D", r=2),
    "esft": EsftConfig(experts={"0": [1, 3]}),
    "esft-lora": EsftConfig(experts={"0": [1, 3]}, expert_adapter="lora", r=2),
    "expert-lora": ExpertLoraConfig(r=2),
    "molora": MoloraConfig(num_experts=2, r=2, target_modules=["q_proj"]),
    "mov": MovConfig(num_experts=2, target_modules=["k_proj"], feedforward_modules=[]),
}


def partition(model: nn.Module) -> nn.Module:
    """Leave empty tensors with the attributes that ZeRO-3 gives them."""
    for parameter in model.parameters():
        parameter.ds_shape, parameter.ds_numel, parameter.whole = parameter.shape, parameter.numel(), parameter.data
        parameter.data = torch.empty(0, dtype=parameter.dtype)
    return model


def adapted(base: nn.Module, config: PeftConfig) -> dict[str, torch.Tensor]:
    """The tensors of a new adapter."""
    torch.manual_seed(0)
    return {name: own for name, own in get_peft_model(base, config).named_parameters() if own.requires_grad}


def assert_same(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and expected
    for name, own in expected.items():
        assert torch.equal(found[name], own), name


@pytest.fixture
def gather(monkeypatch):
    """What DeepSpeed does in its `GatheredParameters`, on parameters of `partition`."""

    class GatheredParameters:
        def __init__(self, parameters):
            self.parameters = parameters

        def __enter__(self):
            for parameter in self.parameters:
                parameter.data = parameter.whole

        def __exit__(self, *error):
            for parameter in self.parameters:
                parameter.data = torch.empty(0, dtype=parameter.dtype)

    zero = type("zero", (), {"GatheredParameters": GatheredParameters})
    monkeypatch.setitem(__import__("sys").modules, "deepspeed.zero", zero)
    monkeypatch.setitem(__import__("sys").modules, "deepspeed", type("deepspeed", (), {"zero": zero}))


@pytest.mark.parametrize("method", CONFIGS)
def test_adapters_of_partitioned_models_have_the_places_and_tensors_of_whole_ones(method, gather):
    assert_same(adapted(tiny_olmoe(), CONFIGS[method]), adapted(partition(tiny_olmoe()), CONFIGS[method]))


def test_sizes_of_a_partitioned_model_are_those_of_the_whole(gather):
    config = PerftConfig(variant="E", r=2)
    parts, whole = describe(partition(tiny_olmoe()), config), describe(tiny_olmoe(), config)
    assert str(parts) == str(whole)
    assert find_moe_layers(partition(tiny_olmoe())) == find_moe_layers(tiny_olmoe())


def test_linear_layers_that_keep_their_weight_transposed_have_their_widths(gather):
    config = {"num_experts": 2, "top_k": 1, "r": 2, "target_modules": ["c_attn"]}
    assert_same(adapted(tiny_gpt2(), RoutedConfig(**config)), adapted(partition(tiny_gpt2()), RoutedConfig(**config)))


def test_experts_that_start_from_the_weight_read_the_whole(gather):
    config = RoutedConfig(num_experts=2, top_k=1, r=2, experts="goat", target_modules=["q_proj"])
    assert_same(adapted(tiny_olmoe(), config), adapted(partition(tiny_olmoe()), config))


def test_values_are_here_in_the_block_alone(gather):
    model = partition(tiny_olmoe())
    experts, number = model.model.layers[0].mlp.experts, find_moe_layers(model)[0].num_experts
    assert keeps_slices(experts, number) and stand_in_fault(experts, number, experts.hidden_dim) is None
    planned = expert_tensors(experts, number)
    assert len(planned) == 2 and all(tensor.is_meta and tensor.shape[0] == number for tensor in planned.values())
    with gathered(experts):
        here = expert_tensors(experts, number)
        assert {name: tensor.shape for name, tensor in here.items()} == {n: t.shape for n, t in planned.items()}
        assert not any(tensor.is_meta for tensor in here.values())
    assert all(is_partitioned(own) and shape_of(own)[0] == number for own in experts.parameters())


def test_routers_vectors_have_the_lengths_of_the_whole(gather):
    config = RoutedConfig(num_experts=3, r=2, target_modules=["q_proj"], scorer="two_layer")
    model = get_peft_model(tiny_olmoe(), config)
    expected = router_norms(model)
    found = router_norms(partition(model))
    assert expected and found.keys() == expected.keys()
    assert all(torch.equal(found[place], own) for place, own in expected.items())
    assert all(is_partitioned(own) for own in model.parameters())


def test_nothing_is_gathered_where_tensors_are_planned():
    with torch.device("meta"), gathered(partition(nn.Linear(3, 2))):  # DeepSpeed would have to be here
        pass


@pytest.mark.parametrize("zero3", [False, True])
def test_zero3_gathers_a_layer_as_one_whose_input_has_a_gradient(zero3):
    model = get_peft_model(tiny_olmoe(), CONFIGS["perft-e"]).train()
    for parameter in model.parameters():
        if zero3:
            parameter.ds_id = 0
    layers, seen = routed_layers(model), []
    layers[0].register_forward_pre_hook(lambda layer, args: seen.append(args[0].requires_grad))
    model(input_ids=torch.arange(3, 9)[None], use_cache=False)
    assert seen == [zero3] and all(layer._z3_leaf for layer in layers)


def test_nothing_is_merged_into_partitioned_weights(gather):
    model = get_peft_model(partition(tiny_olmoe()), CONFIGS["esft"])
    with pytest.raises(ValueError, match="split over processes, so nothing can be merged into it"):
        model.merge_adapter()
    assert not model.base_model.model.model.layers[0].mlp.experts.merged


def test_nothing_is_merged_into_distributed_weights(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        layer = nn.Linear(4, 4)
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.data, mesh, [Shard(0)]))
        with pytest.raises(ValueError, match="split over processes, so nothing can be merged into it"):
            check_mergeable_here(layer, "model.q_proj")
    finally:
        dist.destroy_process_group()
