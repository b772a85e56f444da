"""A tiny random model of every mixture-of-experts type of transformers that the adapters are run on.

Widths are chosen so that no linear layer but a router has one output per expert.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    set_seed,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 64
EXPERTS = 6

# What the types have in common, under all the names they use for it; a type is given the names it knows.
COMMON: dict[str, object] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "kv_lora_rank": 12,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ALL_SPARSE = {"mlp_layer_types": ["sparse", "sparse"]}
LATENT_ATTENTION = {"num_key_value_heads": 4}
LINEAR_ATTENTION = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
INDEXER = {"index_topk": 64, "index_head_dim": 8, "index_n_heads": 4}
INKLING = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "rel_extent": 32, "d_rel": 4}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_chunk_size": 16}

# Model type -> fields of its own.
TYPES: dict[str, Mapping[str, object]] = {
    "afmoe": {},
    "aria_text": {},
    "axk1": {**LATENT_ATTENTION, **ALL_SPARSE},
    "axk2": {**LATENT_ATTENTION, **INDEXER, **ALL_SPARSE, "qk_rope_head_dim": 8},
    "bailing_hybrid": {
        **LATENT_ATTENTION,
        **ALL_SPARSE,
        "head_dim": 8,
        "short_conv_kernel_size": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "beam": ALL_SPARSE,
    "cohere2_moe": ALL_SPARSE,
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": EXPERTS, "moe_top_k": 2, "hidden_size": 32},
    },
    "deepseek_v2": LATENT_ATTENTION,
    "deepseek_v3": LATENT_ATTENTION,
    "deepseek_v32": {**LATENT_ATTENTION, **INDEXER, **ALL_SPARSE},
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "layer_types": ["sliding_attention", "sliding_attention"],
        "mlp_layer_types": ["hash_moe", "moe"],
        "o_groups": 2,
        "o_lora_rank": 12,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 2,
    },
    "dots1": {},
    "dots3_note_text": {**LATENT_ATTENTION, **INDEXER, **ALL_SPARSE},
    "ernie4_5_moe": {"moe_layer_start_index": 0},
    "exaone_moe": ALL_SPARSE,
    "flex_olmo": {},
    "flint": {"mlp_only_layers": []},
    "gemma4_text": {"enable_moe_block": True, "top_k_experts": 2, "hidden_size_per_layer_input": 0},
    "glm4_moe": {},
    "glm4_moe_lite": {**LATENT_ATTENTION, **ALL_SPARSE},
    "glm_moe_dsa": {**LATENT_ATTENTION, **INDEXER, **ALL_SPARSE},
    "gpt_oss": {},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention"]},
    "granitemoeshared": {"shared_intermediate_size": 24},
    "hunyuan_v1_moe": {},
    "hy_v3": ALL_SPARSE,
    "hy_v4": {**INDEXER, **ALL_SPARSE},
    "inkling_text": {**INKLING, **ALL_SPARSE},
    "inkling2_text": {**INKLING, **ALL_SPARSE},
    "jamba": {"expert_layer_period": 1, "expert_layer_offset": 0, "attn_layer_period": 2, "attn_layer_offset": 1},
    "jetmoe": {"kv_channels": 8},
    "kimi_linear": {
        **LATENT_ATTENTION,
        **ALL_SPARSE,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "kolibri1": {},
    "laguna": ALL_SPARSE,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"intermediate_size_mlp": 48},
    "longcat_flash": {**LATENT_ATTENTION, "num_layers": 2, "head_dim": 4, "zero_expert_num": 3},
    "mellum": {},
    "mimo_v2_flash": ALL_SPARSE,
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "block_size": 4},
    "minimax_m2": {},
    "minimax_m3_vl_text": {
        **ALL_SPARSE,
        "dense_intermediate_size": 48,
        "shared_intermediate_size": 24,
        "rotary_dim": 4,
    },
    "mixtral": {},
    "nemotron_h": {
        "layer_types": ["linear_attention", "moe", "full_attention", "moe"],
        "num_hidden_layers": 4,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 1,
        "ssm_state_size": 16,
        "chunk_size": 16,
        "moe_shared_expert_intermediate_size": 24,
        "moe_latent_size": 20,
    },
    "nllb-moe": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
        "decoder_start_token_id": 2,
    },
    "olmoe": {},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "qwen3_next": LINEAR_ATTENTION,
    "qwen3_5_moe_text": LINEAR_ATTENTION,
    "solar_open": {},
    "switch_transformers": {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "decoder_start_token_id": 0,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}


# Type -> why no adapter follows its experts; an adapter with a router of its own wraps its blocks.
OPAQUE = {
    "jetmoe": "calls no module with its routing",
    "llama4_text": "runs every expert and is given no indices",
    "nllb-moe": "keeps a module for each expert",
    "switch_transformers": "keeps a module for each expert",
}
# Types whose experts are no stacks of matrices, of which slices could be trained.
NO_SLICES = ("dbrx",)
FOLLOWED = tuple(name for name in TYPES if name not in OPAQUE)


def known(model_type: str) -> bool:
    """Whether the installed transformers has the type."""
    return model_type in CONFIG_MAPPING


def known_fields(cls: type, values: Mapping[str, object]) -> dict[str, object]:
    """The values whose names a configuration knows, each under one name."""
    aliases = cls.attribute_map or {}
    names = {*inspect.get_annotations(cls), *aliases}
    fields = {name: value for name, value in values.items() if name in names}
    for alias, name in aliases.items():
        if alias in fields and name in fields:
            del fields[alias]
    return fields


def tiny_config(model_type: str, **overrides):
    """Its smallest useful configuration."""
    fields = known_fields(CONFIG_MAPPING[model_type], COMMON)
    return AutoConfig.for_model(model_type, **{**fields, **TYPES[model_type], **overrides})


def tiny_model(model_type: str, seed: int = 0, **overrides) -> nn.Module:
    set_seed(seed)
    config = tiny_config(model_type, **overrides)
    auto = AutoModelForSeq2SeqLM if getattr(config, "is_encoder_decoder", False) else AutoModelForCausalLM
    return auto.from_config(config).eval()
