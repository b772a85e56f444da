"""Adapters of the sweep: methods around a backbone's blocks and experts, and experts that really receive tokens."""

from __future__ import annotations

import copy
from collections.abc import Collection
from functools import cache

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from moe_peft import EsftConfig, ExpertLoraConfig, MoloraConfig, MovConfig, PerftConfig
from moe_peft.backbone.experts_call import experts_call
from moe_peft.backbone.structure import find_moe_layers
from moe_peft.config.config import MoeConfig
from tests.backbones.models import FOLLOWED, NO_SLICES, OPAQUE, TYPES, VOCAB, known, tiny_model

# What `make test` runs; the other types are marked slow.
REPRESENTATIVE = (
    "dbrx",
    "deepseek_v2",
    "deepseek_v3",
    "gemma4_text",
    "gpt_oss",
    "granitemoe",
    "longcat_flash",
    "minimax",
    "mixtral",
    "nemotron_h",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
)
METHODS = ("perft-r", "perft-e", "esft", "expert-lora")


def marked(model_type: str, *values: str, representative: Collection[str] = REPRESENTATIVE):
    """A test parameter; slow where the type is not among the representative ones."""
    missing = pytest.mark.skipif(not known(model_type), reason=f"the installed transformers has no {model_type}")
    marks = [missing] if model_type in representative else [missing, pytest.mark.slow]
    return pytest.param(model_type, *values, marks=marks, id="-".join((model_type, *values)))


FOLLOWED_CASES = [
    marked(model_type, method)
    for model_type in FOLLOWED
    for method in METHODS
    if method != "expert-lora" or model_type not in NO_SLICES
]
CASES = FOLLOWED_CASES + [marked(model_type, "perft-r") for model_type in OPAQUE]
# Linear adapters, some of whose places no token of a batch may reach: separate experts have linear layers too.
LINEAR_CASES = [marked(model_type, "all-linear") for model_type in TYPES] + [
    marked(model_type, "mov") for model_type in OPAQUE if model_type != "jetmoe"
]
BLOCK_CASES = [marked(model_type, "perft-r") for model_type in TYPES]


@cache
def base_model(model_type: str) -> nn.Module:
    """A frozen model; copy it before changing it."""
    return tiny_model(model_type).requires_grad_(False)


def batch_for(model: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def config_for(model_type: str, method: str) -> MoeConfig:
    if method == "perft-r":
        return PerftConfig(r=2, num_experts=4, lora_dropout=0.0)
    if method == "perft-e":
        return PerftConfig(variant="E", r=2, lora_dropout=0.0)
    if method == "expert-lora":
        return ExpertLoraConfig(r=2)
    if method == "all-linear":
        return MoloraConfig(r=2, num_experts=4, target_modules="all-linear")
    if method == "mov":
        return MovConfig(num_experts=4)
    experts = used_experts(model_type)
    if model_type in NO_SLICES:
        return EsftConfig(experts=experts, expert_adapter="lora", r=2)
    return EsftConfig(experts=experts)


@cache
def used_experts(model_type: str) -> dict[str, list[int]]:
    """The two experts of each layer that the batch uses most."""
    model = base_model(model_type)
    counts: dict[str, torch.Tensor] = {}
    handles = []
    for layer in find_moe_layers(model):
        key, num_experts = str(layer.index), layer.num_experts

        def count(module, args, kwargs, key=key, num_experts=num_experts):
            index = experts_call(args, kwargs).index
            counts[key] = torch.bincount(index[index < num_experts], minlength=num_experts)

        handles.append(model.get_submodule(layer.experts).register_forward_pre_hook(count, with_kwargs=True))
    model(**batch_for(model))
    for handle in handles:
        handle.remove()
    return {key: sorted(count.topk(2).indices.tolist()) for key, count in counts.items()}


def adapted(model_type: str, method: str, *, random: bool = True) -> nn.Module:
    """An adapted copy of the model in eval mode, with adapters that change the output."""
    model = get_peft_model(copy.deepcopy(base_model(model_type)), config_for(model_type, method)).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if random and f".{model.base_model.prefix}" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def assert_adapter_alone_has_gradients(model: PeftModel) -> None:
    """Every tensor of the adapter has a finite gradient that is not zero, and nothing else has one."""
    for name, parameter in model.named_parameters():
        is_adapter = f".{model.base_model.prefix}" in name
        assert parameter.requires_grad == is_adapter, name
        assert (parameter.grad is not None) == is_adapter, name
        if is_adapter:
            assert torch.isfinite(parameter.grad).all() and parameter.grad.any(), name
