"""Default places of mixtures of vectors on common architectures, against peft's (IA)3, and the widths of heads."""

from __future__ import annotations

import re

import pytest
import torch
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as IA3_FEEDFORWARD,
)
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as IA3_TARGETS,
)
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from moe_peft import MovConfig, describe
from moe_peft.places.key_value_ffn import ffn_output_names, head_widths, key_value_names
from moe_peft.places.linear import linear_names, reads_encoder_states
from tests.tiny import tiny_llama

SHARED = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 16, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
BART = {
    "d_model": 32,
    **{f"{stack}_{what}": n for stack in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 48))},
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "vocab_size": 64,
}
MLA = {
    **SHARED,
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
HEADS = {"num_key_value_heads": 4}
MOE = {**SHARED, "num_experts": 4, "moe_intermediate_size": 16}

# Model type -> its fields, places of keys and values, places of FFNs, and heads routed apart at the first ones.
ARCHITECTURES: dict[str, tuple[dict, set[str], set[str], int]] = {
    "llama": (SHARED, {"k_proj", "v_proj"}, {"down_proj"}, 2),
    "mistral": (SHARED, {"k_proj", "v_proj"}, {"down_proj"}, 2),
    "qwen2": (SHARED, {"k_proj", "v_proj"}, {"down_proj"}, 2),
    "qwen3": ({**SHARED, "head_dim": 16}, {"k_proj", "v_proj"}, {"down_proj"}, 2),
    "gemma": ({**SHARED, "head_dim": 16}, {"k_proj", "v_proj"}, {"down_proj"}, 2),
    "gemma2": ({**SHARED, "head_dim": 16}, {"k_proj", "v_proj"}, {"down_proj"}, 2),
    "gemma3_text": ({**SHARED, "head_dim": 16}, {"k_proj", "v_proj"}, {"down_proj"}, 2),
    "phi": ({**SHARED, **HEADS}, {"k_proj", "v_proj"}, {"fc2"}, 4),
    "phi3": (SHARED, {"qkv_proj"}, {"down_proj"}, 1),
    "gpt2": (GPT2, {"c_attn"}, {"mlp.c_proj"}, 1),
    "gpt_bigcode": (GPT2, {"c_attn"}, {"mlp.c_proj"}, 1),
    "gpt_neo": (
        {**SHARED, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]},
        {"k_proj", "v_proj"},
        {"c_proj"},
        4,
    ),
    "gptj": ({**GPT2, "rotary_dim": 4}, {"k_proj", "v_proj"}, {"fc_out"}, 4),
    "gpt_neox": (SHARED, {"query_key_value"}, {"dense_4h_to_h"}, 1),
    "falcon": (SHARED, {"query_key_value"}, {"dense_4h_to_h"}, 1),
    "opt": ({**SHARED, "ffn_dim": 48, "word_embed_proj_dim": 32}, {"k_proj", "v_proj"}, {"fc2"}, 4),
    "bloom": ({**SHARED, "n_layer": 2, "n_head": 4}, {"query_key_value"}, {"dense_4h_to_h"}, 1),
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 64}, {"Wqkv"}, {"down_proj"}, 1),
    "bert": (SHARED, {"key", "value"}, {"output.dense"}, 4),
    "roberta": (SHARED, {"key", "value"}, {"output.dense"}, 4),
    "deberta-v2": (SHARED, {"key_proj", "value_proj"}, {"output.dense"}, 4),
    "deberta": (SHARED, {"in_proj"}, {"output.dense"}, 1),
    "distilbert": (
        {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": 64},
        {"k_lin", "v_lin"},
        {"lin2"},
        4,
    ),
    "bart": (BART, {"k_proj", "v_proj"}, {"fc2"}, 4),
    "t5": (T5, {"k", "v"}, {"wo"}, 4),
    "mt5": ({**T5, "feed_forward_proj": "gated-gelu"}, {"k", "v"}, {"wo"}, 4),
    "deepseek_v2": ({**MLA, "topk_method": "greedy"}, {"kv_b_proj"}, {"down_proj"}, 1),
    "deepseek_v3": (MLA, {"kv_b_proj"}, {"down_proj"}, 1),
    "mixtral": ({**SHARED, "num_local_experts": 4}, {"k_proj", "v_proj"}, set(), 2),
    "olmoe": (MOE, {"k_proj", "v_proj"}, set(), 2),
    "qwen3_moe": ({**MOE, "head_dim": 8}, {"k_proj", "v_proj"}, set(), 2),
    "qwen2_moe": (
        {**MOE, "shared_expert_intermediate_size": 24},
        {"k_proj", "v_proj"},
        {"shared_expert.down_proj"},
        2,
    ),
    "jetmoe": ({**SHARED, "num_local_experts": 4, "kv_channels": 8}, {"kv_proj"}, set(), 1),
    "granitemoehybrid": (
        {
            **SHARED,
            "num_local_experts": 4,
            "shared_intermediate_size": 24,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
        },
        {"k_proj", "v_proj"},
        {"output_linear"},
        2,
    ),
}
# Widths of heads differ between layers.
GEMMA4 = {**SHARED, "head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 8}


def build(model_type: str, fields: dict) -> nn.Module:
    config = AutoConfig.for_model(model_type, **fields)
    encoders = ("bert", "roberta", "deberta", "deberta-v2", "distilbert")
    auto = AutoModelForCausalLM
    if model_type in encoders:
        auto = AutoModelForSequenceClassification
    elif config.is_encoder_decoder:
        auto = AutoModelForSeq2SeqLM
    with torch.device("meta"):
        return auto.from_config(config)


def ends_with(name: str, ending: str) -> bool:
    return f".{name}".endswith(f".{ending}")


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_default_places_are_keys_values_and_what_reads_the_intermediate(model_type):
    fields, keys_and_values, ffns, heads = ARCHITECTURES[model_type]
    model = build(model_type, fields)
    description = describe(model, MovConfig())
    sides = {place.name: description.config.scales_input(place.name) for place in description.places}
    linears = [name for name in linear_names(model) if re.search(r"\.\d+\.", name)]
    inside = re.compile("attn|attention", re.IGNORECASE)
    wanted = {n: False for n in linears if inside.search(n) and any(ends_with(n, e) for e in keys_and_values)}
    wanted |= {n: True for n in linears if not inside.search(n) and any(ends_with(n, e) for e in ffns)}
    assert wanted and sides == wanted
    assert {ending for ending in keys_and_values | ffns if any(ends_with(n, ending) for n in sides)} == (
        keys_and_values | ffns
    )
    with torch.device("meta"):
        banks = {place.name: description.config.build(place).experts for place in description.places}
    assert {banks[name].num_heads for name, at_input in sides.items() if not at_input} == {heads}
    assert {banks[name].num_heads for name, at_input in sides.items() if at_input} <= {1}


# peft's table has queries in place of keys for these; (IA)3 scales keys and values.
WITH_QUERIES = {"bart", "gemma", "gemma2", "gemma3_text", "gpt_neo", "gptj", "opt", "phi", "qwen2", "qwen3"}
# mt5: peft scales the output of wi_1; mixtral: its fused experts have no layer "w2" in transformers 5.
OTHER_FFN = {"mt5", "mixtral"}
# "output.dense" also names attention's output, which (IA)3 does not scale.
BROAD = {"bert", "roberta", "deberta", "deberta-v2"}


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES.keys() & IA3_TARGETS.keys()))
def test_places_are_those_of_pefts_ia3(model_type):
    model = build(model_type, ARCHITECTURES[model_type][0])
    description = describe(model, MovConfig())
    ours = {place.name: description.config.scales_input(place.name) for place in description.places}
    theirs = {
        name: any(name.endswith(ending) for ending in IA3_FEEDFORWARD[model_type])
        for name in linear_names(model)
        if any(ends_with(name, ending) for ending in IA3_TARGETS[model_type])
    }
    if model_type in BROAD:
        theirs = {name: side for name, side in theirs.items() if "attention.output" not in name}
    if model_type in WITH_QUERIES:
        assert any("q_proj" in name for name in theirs) or model_type == "opt"
        ours, theirs = ({n: s for n, s in sides.items() if s} for sides in (ours, theirs))
    if model_type == "gpt_neo":  # peft's "c_proj" is the FFN's
        assert all("mlp" in name for name in theirs)
    if model_type in OTHER_FFN:
        ours, theirs = ({n: s for n, s in sides.items() if "ttention" in n or "attn" in n} for sides in (ours, theirs))
    assert ours and ours == theirs


def test_width_of_a_head_is_that_of_each_attention_module():
    widths = head_widths(build("gemma4_text", GEMMA4))
    assert set(widths.values()) == {8, 16}
    assert len(ffn_output_names(build("gemma4_text", GEMMA4))) == 2  # not the bottleneck of each layer
    assert head_widths(build("deepseek_v3", MLA)) == {}
    t5 = build("t5", T5)
    assert set(head_widths(t5).values()) == {16} and len(head_widths(t5)) == 2 * 6
    assert set(head_widths(tiny_llama()).values()) == {8}


def test_mixers_and_bottlenecks_are_no_ffn():
    fields = {
        **SHARED,
        "num_experts": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    }
    assert ffn_output_names(build("jamba", fields)) == ["model.layers.0.feed_forward.down_proj"]
    fields = {
        **SHARED,
        "head_dim": 8,
        "intermediate_size": [48, 48],
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "num_kv_shared_layers": 0,
        "layer_types": ["full_attention", "full_attention"],
        "activation_sparsity_pattern": [0.0, 0.0],
    }
    names = ffn_output_names(build("gemma3n_text", fields))
    assert [name.rpartition("layers.")[2] for name in names] == ["0.mlp.down_proj", "1.mlp.down_proj"]


def test_models_without_keys_and_values_are_refused():
    model = build("mamba", SHARED)
    with pytest.raises(ValueError, match=r"no key and value projections. Please specify .*'in_proj'"):
        key_value_names(model)
    with pytest.raises(ValueError, match="no key and value projections"):
        describe(model, MovConfig())


def test_keys_and_values_of_cross_attention_read_encoder_states():
    names = [
        "decoder.block.0.layer.1.EncDecAttention.v",
        "layers.0.encoder_attn.k_proj",
        "h.0.crossattention.c_attn",
        "decoder.layers.0.cross_attention.v_proj",
        "layer.0.encoder_decoder_attention.attention.key",
    ]
    assert all(reads_encoder_states(name) for name in names)
    others = [
        "layers.0.encoder_attn.q_proj",
        "h.0.crossattention.c_proj",
        "encoder.cross_attention.attention.self.key",
        "h.0.attn.c_attn",
        "layers.0.self_attn.v_proj",
    ]
    assert not any(reads_encoder_states(name) for name in others)
