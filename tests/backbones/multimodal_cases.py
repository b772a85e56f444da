"""Adapters of the multi-modal sweep on copies of one frozen model per type, and what each type can be given."""

from __future__ import annotations

import copy
from functools import cache, partial

import pytest
import torch
from peft import get_peft_model
from torch import nn

from moe_peft import EsftConfig, LoraMoeConfig, MoloraConfig, MovConfig, PerftConfig
from moe_peft.backbone.experts_call import experts_call
from moe_peft.backbone.structure import find_moe_layers, opaque_blocks
from moe_peft.config.config import MoeConfig
from tests.backbones.cases import marked as _marked
from tests.backbones.models import known
from tests.backbones.multimodal_models import MULTIMODAL, image_batch, tiny_multimodal

# What `make test` runs; the other types are marked slow.
REPRESENTATIVE = ("dots3_note", "ernie4_5_vl_moe", "gemma4", "llama4", "llava", "qwen3_vl_moe")
# Type -> why no adapter follows its experts.
OPAQUE = {"llama4": "runs every expert and is given no indices"}
# Type -> why no adapter is told which of its experts to train.
AMBIGUOUS = {"ernie4_5_vl_moe": "both belong to layer"}
# Types without a linear layer in the FFNs of their language model, all of which are experts.
NO_FFN_LINEARS = ("inkling2", "internvl", "llava", "qwen3_omni_moe_thinker", "qwen3_vl_moe")
# Types whose attention layers say of themselves neither that they are attention nor that they are none.
NO_ATTENTION_NAMES = ("nemotron_h_omni",)


marked = partial(_marked, representative=REPRESENTATIVE)


def methods_of(model_type: str) -> tuple[str, ...]:
    """Methods around blocks and experts that a type can be trained with."""
    if model_type in OPAQUE:
        return ("perft-r",)
    return ("perft-r", "perft-e") if model_type in AMBIGUOUS else ("perft-r", "perft-e", "esft")


def linear_methods_of(model_type: str) -> tuple[str, ...]:
    """Methods on linear layers whose default places a type has."""
    without_ffn = () if model_type in NO_FFN_LINEARS else ("loramoe",)
    return (*without_ffn, "molora") if model_type in NO_ATTENTION_NAMES else ("mov", *without_ffn, "molora")


TYPE_CASES = [marked(model_type) for model_type in MULTIMODAL]
CASES = [marked(model_type, method) for model_type in MULTIMODAL for method in methods_of(model_type)]
LINEAR_CASES = [marked(model_type, method) for model_type in MULTIMODAL for method in linear_methods_of(model_type)]
SCORED_CASES = [marked(model_type) for model_type in MULTIMODAL if "esft" in methods_of(model_type)]


@cache
def base_model(model_type: str) -> nn.Module:
    """A frozen model; copy it before changing it. Skips the test where transformers has no such type."""
    if not known(model_type):
        pytest.skip(f"the installed transformers has no {model_type}")
    return tiny_multimodal(model_type).requires_grad_(False)


def batch_for(model_type: str, length: int = 12) -> dict[str, torch.Tensor]:
    """Text around images."""
    return image_batch(model_type, base_model(model_type), length=length)


def training_batch(model_type: str) -> dict[str, torch.Tensor]:
    """The same with labels, which are none at the padding."""
    batch = batch_for(model_type)
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


@cache
def routing(model_type: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Experts module -> (T, K) experts and weights that the batch uses there."""
    model, seen = base_model(model_type), {}

    def watch(module, args, kwargs, name):
        call = experts_call(args, kwargs)
        seen[name] = (call.index, call.weights)

    handles = [
        model.get_submodule(layer.experts).register_forward_pre_hook(
            lambda *call, name=layer.experts: watch(*call, name), with_kwargs=True
        )
        for layer in find_moe_layers(model)
    ]
    model(**batch_for(model_type))
    for handle in handles:
        handle.remove()
    return seen


def used_experts(model_type: str) -> dict[str, list[int]]:
    """The two experts of each layer that the batch uses most."""
    chosen = {}
    for layer in find_moe_layers(base_model(model_type)):
        index = routing(model_type)[layer.experts][0]
        counts = torch.bincount(index[index < layer.num_experts], minlength=layer.num_experts)
        chosen[str(layer.index)] = sorted(counts.topk(2).indices.tolist())
    return chosen


def config_for(model_type: str, method: str) -> MoeConfig:
    if method == "esft":
        return EsftConfig(experts=used_experts(model_type))
    return {
        "perft-r": lambda: PerftConfig(r=2, num_experts=4, lora_dropout=0.0),
        "perft-e": lambda: PerftConfig(variant="E", r=2, lora_dropout=0.0),
        "mov": lambda: MovConfig(num_experts=4),
        "loramoe": lambda: LoraMoeConfig(r=2, num_experts=4, lora_dropout=0.0),
        "molora": lambda: MoloraConfig(r=2, num_experts=4),
        "all-linear": lambda: MoloraConfig(r=2, num_experts=4, target_modules="all-linear"),
    }[method]()


def adapted(model_type: str, method: str, *, random: bool = True) -> nn.Module:
    """An adapted copy of the model in eval mode, with adapters that change the output."""
    return with_adapter(model_type, config_for(model_type, method), random=random)


def with_adapter(model_type: str, config: MoeConfig, *, random: bool = True) -> nn.Module:
    model = get_peft_model(copy.deepcopy(base_model(model_type)), config).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if random and f".{model.base_model.prefix}" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def sparse_blocks(model: nn.Module) -> list[str]:
    """The blocks that an adapter with a router of its own wraps."""
    layers = [layer.block or layer.experts for layer in find_moe_layers(model)]
    return layers or list(opaque_blocks(model))
