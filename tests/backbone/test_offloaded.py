"""Adapters of layers whose weights are offloaded train as those of layers that are loaded."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import get_peft_model
from torch import nn

from moe_peft import EsftConfig, ExpertLoraConfig, MoloraConfig, MovConfig, PerftConfig, RoutedConfig
from moe_peft.backbone.offloaded import execution_device, onloaded
from tests.contract.cases import randomize, tiny_olmoe

OWN = {"r": 2, "lora_dropout": 0.0}
CONFIGS = {
    "perft-r": PerftConfig(variant="R", num_experts=2, top_k=1, **OWN),
    "perft-e": PerftConfig(variant="E", **OWN),
    "esft": EsftConfig(experts={"0": [1, 3], "1": [2]}),
    "esft-lora": EsftConfig(experts={"1": [1, 3]}, expert_adapter="lora", **OWN),
    "expert-lora": ExpertLoraConfig(**OWN),
    "molora": MoloraConfig(num_experts=2, target_modules=["q_proj"], **OWN),
    "goat": RoutedConfig(num_experts=2, top_k=1, experts="goat", target_modules=["q_proj"], **OWN),
    "mov": MovConfig(num_experts=2, target_modules=["k_proj"], feedforward_modules=[]),
}


def on_disk(model: nn.Module, folder) -> nn.Module:
    """With the second layer on disk."""
    names = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    places = {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk"}
    return dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def in_memory(model: nn.Module, folder) -> nn.Module:
    """With the second layer kept on the CPU and filled in around each call."""
    cpu_offload(model.model.layers[1], execution_device=torch.device("cpu"))
    return model


def trained(base: nn.Module, method: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and gradients of a new adapter."""
    torch.manual_seed(0)
    model = get_peft_model(base, CONFIGS[method]).train()
    randomize(model)
    out = model(input_ids=torch.arange(3, 15).view(2, 6), labels=torch.arange(3, 15).view(2, 6), use_cache=False)
    out.loss.backward()
    return out.logits, {name: own.grad for name, own in model.named_parameters() if own.requires_grad}


@pytest.mark.parametrize("offload", [in_memory, on_disk])
@pytest.mark.parametrize("method", CONFIGS)
def test_adapters_of_offloaded_layers_train_as_those_of_loaded_ones(method, offload, tmp_path):
    logits, gradients = trained(tiny_olmoe(), method)
    found_logits, found = trained(offload(tiny_olmoe(), tmp_path), method)
    torch.testing.assert_close(found_logits, logits)
    assert found.keys() == gradients.keys() and gradients
    for name, own in gradients.items():
        torch.testing.assert_close(found[name], own, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("method", ["esft", "goat"])
def test_experts_that_start_from_offloaded_weights_have_their_values(method, tmp_path):
    torch.manual_seed(0)
    whole = get_peft_model(tiny_olmoe(), CONFIGS[method])
    torch.manual_seed(0)
    found = dict(get_peft_model(in_memory(tiny_olmoe(), tmp_path), CONFIGS[method]).named_parameters())
    for name, own in whole.named_parameters():
        if own.requires_grad:
            torch.testing.assert_close(found[name], own)


def test_weights_are_here_in_the_block_alone(tmp_path):
    experts = in_memory(tiny_olmoe(), tmp_path).model.layers[1].mlp.experts
    assert all(own.is_meta for own in experts.parameters())
    with onloaded(experts):
        assert not any(own.is_meta for own in experts.parameters(recurse=False))
    assert all(own.is_meta for own in experts.parameters())


def test_a_model_without_memory_has_no_device_to_compute_on(tmp_path):
    with torch.device("meta"):
        assert execution_device(nn.Linear(2, 2)) is None
    block = in_memory(tiny_olmoe(), tmp_path).model.layers[1].mlp
    assert execution_device(block) == torch.device("cpu")
