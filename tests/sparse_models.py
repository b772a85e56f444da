"""Tiny random models with mixture-of-experts blocks, plain, renormalising, with shared experts; and PERFT on them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    set_seed,
)

from moe_peft import PerftConfig
from moe_peft.layers import RoutedLayer
from tests.contract.cases import randomize, tiny_olmoe
from tests.tiny import FFN, HIDDEN, LAYERS, VOCAB, tiny_mixtral

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_qwen3_moe() -> Qwen3MoeForCausalLM:
    """Its router rescales the weights of the selected experts to sum to one."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**COMMON, **experts, num_key_value_heads=2, head_dim=8))


def tiny_deepseek_v2() -> DeepseekV2ForCausalLM:
    """Its first layer is dense, its block adds a shared expert and scales the routed sum by 2.5."""
    heads = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1}
    return DeepseekV2ForCausalLM(
        DeepseekV2Config(
            **COMMON,
            **heads,
            **experts,
            num_key_value_heads=4,
            first_k_dense_replace=1,
            routed_scaling_factor=2.5,
            topk_method="greedy",
            n_group=1,
            topk_group=1,
        )
    )


def tiny_minimax() -> MiniMaxForCausalLM:
    """It looks its routers up by their path."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return MiniMaxForCausalLM(MiniMaxConfig(**COMMON, **experts, num_key_value_heads=2, head_dim=8))


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "olmoe": tiny_olmoe,
    "mixtral": tiny_mixtral,
    "qwen3_moe": tiny_qwen3_moe,
    "deepseek_v2": tiny_deepseek_v2,
    "minimax": tiny_minimax,
}
# The four whose forward runs in float64.
SPARSE = ("olmoe", "mixtral", "qwen3_moe", "deepseek_v2")
# Those whose combine weights sum to one.
RENORMALISING = ("mixtral", "qwen3_moe")


def sparse_model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A frozen tiny model in eval mode, whose experts run in a Python loop, the only way that has float64."""
    set_seed(0)
    model = BUILDERS[name]()
    model.set_experts_implementation("eager")
    return model.to(dtype).eval().requires_grad_(False)


def perft_config(variant: str, **fields) -> PerftConfig:
    return PerftConfig(**{"variant": variant, "r": 3, "lora_dropout": 0.0, "task_type": "CAUSAL_LM", **fields})


def perft_model(name: str, variant: str, **fields) -> nn.Module:
    """A float64 model in eval mode with random adapters."""
    model = get_peft_model(sparse_model(name, torch.float64), perft_config(variant, **fields)).eval()
    randomize(model)
    return model.double()


def block_of(model: nn.Module) -> nn.Module:
    """The second layer's block, which is sparse in all models."""
    return model.base_model.model.model.layers[1].mlp


def layer_of(model: nn.Module) -> RoutedLayer:
    (layer,) = [module for module in block_of(model).modules() if isinstance(module, RoutedLayer)]
    return layer


def experts_of(model: nn.Module):
    return layer_of(model).experts["default"]


def router_weight(model: nn.Module) -> nn.Parameter:
    return layer_of(model).router["default"].weight
