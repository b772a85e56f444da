"""Tiny sparse models with eight experts a layer, three of which a token uses: every kind of fused experts module."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    set_seed,
)

from moe_peft import EsftConfig
from moe_peft.layers import SlicedExperts

NUM_EXPERTS = 8
SHARED = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 128,
    # Wide enough for the experts to matter.
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT_ATTENTION = {"kv_lora_rank": 8, "q_lora_rank": None, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}
DEEPSEEK = {**LATENT_ATTENTION, "v_head_dim": 8, "n_routed_experts": NUM_EXPERTS, "n_shared_experts": 1}
KINDS: dict[str, tuple[type[PreTrainedModel], type, dict[str, Any]]] = {
    "olmoe": (OlmoeForCausalLM, OlmoeConfig, {"num_experts": NUM_EXPERTS}),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {"num_experts": NUM_EXPERTS, "head_dim": 8}),
    "qwen2_moe": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig,
        {"num_experts": NUM_EXPERTS, "shared_expert_intermediate_size": 16},
    ),
    "deepseek_v2": (DeepseekV2ForCausalLM, DeepseekV2Config, {**DEEPSEEK, "first_k_dense_replace": 0}),
    "deepseek_v3": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        {**DEEPSEEK, "first_k_dense_replace": 0, "n_group": 2, "topk_group": 1},
    ),
    # Biases, transposed matrices and a clamped gate.
    "gpt_oss": (
        GptOssForCausalLM,
        GptOssConfig,
        {"num_local_experts": NUM_EXPERTS, "head_dim": 8, "layer_types": ["full_attention"] * 2, "rope_scaling": None},
    ),
    # Experts without a gate, in a latent space.
    "nemotron_h": (
        NemotronHForCausalLM,
        NemotronHConfig,
        {
            "n_routed_experts": NUM_EXPERTS,
            "n_shared_experts": 1,
            "moe_shared_expert_intermediate_size": 16,
            "moe_latent_size": 16,
            "head_dim": 8,
            "layers_block_type": ["moe", "moe"],
        },
    ),
}
FOUR_KINDS = ("olmoe", "qwen3_moe", "deepseek_v3", "gpt_oss")
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
# Experts to train in both layers; layer 1 has one that few tokens use.
EXPERTS = {"0": [1, 3, 6], "1": [2]}


def sparse_model(kind: str, implementation: str = "eager", **overrides: Any) -> PreTrainedModel:
    """A random model in eval mode; `implementation` is how it computes its experts."""
    set_seed(0)
    model_cls, config_cls, fields = KINDS[kind]
    model = model_cls(config_cls(**{**SHARED, **fields, **overrides})).eval()
    model.set_experts_implementation(implementation)
    for name, parameter in model.named_parameters():
        if name.endswith(("_bias", "router.bias")):
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def token_batch(rows: int = 3, length: int = 11, seed: int = 0) -> dict[str, Any]:
    """Random token ids, which are the labels too, to be run without a cache."""
    ids = torch.randint(3, SHARED["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def experts_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The fused experts modules of a model without adapters, in its order."""
    return [module for module in model.modules() if hasattr(module, "has_gate") and hasattr(module, "down_proj")]


def randomize_copies(model: torch.nn.Module) -> None:
    """Give the copies of experts other weights, so that they change the output."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".esft_experts." in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def esft(model: torch.nn.Module, **fields: Any) -> PeftModel:
    """The model with an adapter that trains `EXPERTS`."""
    return get_peft_model(model, EsftConfig(**{"task_type": "CAUSAL_LM", "experts": EXPERTS, **fields}))


def slices_of(model, adapter: str = "default") -> dict[tuple[str, str], torch.Tensor]:
    """(layer, tensor) -> the adapter's slices."""
    found = {}
    for name, parameter in model.named_parameters():
        if f".esft_experts.{adapter}." in name:
            found[name.split(".layers.")[1].split(".")[0], name.rpartition(".")[2]] = parameter
    return found


def frozen_and_adapted(kind: str = "olmoe", implementation: str = "eager", experts=EXPERTS) -> tuple[Any, Any]:
    """A frozen model, and one with random copies of some of its experts."""
    base = sparse_model(kind, implementation).requires_grad_(False)
    model = esft(copy.deepcopy(base), experts=experts).eval()
    randomize_copies(model)
    return base, model


def logits(model: torch.nn.Module) -> torch.Tensor:
    """What a model predicts for a fixed batch."""
    with torch.no_grad():
        return model(**token_batch()).logits


def first_layer(model: torch.nn.Module) -> SlicedExperts:
    """The first layer with copies."""
    return next(module for module in model.modules() if isinstance(module, SlicedExperts))
