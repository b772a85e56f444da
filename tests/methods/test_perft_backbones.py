"""PERFT on blocks of unusual forms: tuples, shared and latent experts, no block at all, noise on the input."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, set_seed

from moe_peft import describe
from tests.contract.cases import randomize
from tests.sparse_models import COMMON, perft_config
from tests.tiny import padded_batch

GROUPED = {"num_key_value_heads": 2}
ATTENTION = {**GROUPED, "head_dim": 8}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
FULL_ATTENTION = ["full_attention", "full_attention"]
# Model type -> fields of a tiny configuration, the places of R and E in its first sparse layer, their widths.
CASES = {
    "gpt_oss": ({**ATTENTION, **LOCAL, "layer_types": FULL_ATTENTION}, "mlp", "mlp.experts", 32),
    "qwen2_moe": (
        {**ROUTED, **GROUPED, "shared_expert_intermediate_size": 16},
        "mlp",
        "mlp.experts",
        32,
    ),
    "granitemoe": ({**LOCAL, **GROUPED}, "block_sparse_moe", "block_sparse_moe.experts", 32),
    "phimoe": ({**LOCAL, **GROUPED, "input_jitter_noise": 0.1}, "mlp", "mlp.experts", 32),
    "gemma4_text": (
        {
            **ATTENTION,
            "global_head_dim": 8,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 16,
            "enable_moe_block": True,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 64,
            "num_kv_shared_layers": 0,
            "layer_types": FULL_ATTENTION,
        },
        "experts",
        "experts",
        32,
    ),
    "nemotron_h": (
        {
            **ATTENTION,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
            "moe_latent_size": 16,
            "layers_block_type": ["moe", "attention"],
            "n_group": 1,
            "topk_group": 1,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
        },
        "mixer",
        "mixer.experts",
        16,
    ),
}


def build(name: str) -> nn.Module:
    set_seed(0)
    fields = {**COMMON, **CASES[name][0]}
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**fields)).eval().requires_grad_(False)


@pytest.mark.parametrize("name", CASES)
def test_adapters_stand_where_the_backbone_keeps_its_experts(name):
    _, block, experts, width = CASES[name]
    routed, embedded = (describe(build(name), perft_config(variant)).places[0] for variant in ("R", "E"))
    assert (routed.name, routed.in_features) == (f"model.layers.0.{block}", 32)
    assert (embedded.name, embedded.in_features, embedded.num_experts) == (f"model.layers.0.{experts}", width, 4)


@pytest.mark.parametrize("variant", ["R", "E"])
@pytest.mark.parametrize("name", CASES)
def test_fresh_adapters_change_nothing_and_all_of_them_train(name, variant):
    base, batch = build(name), padded_batch([9, 6])
    model = get_peft_model(copy.deepcopy(base), perft_config(variant)).eval()
    expected = base(**batch).logits
    assert torch.equal(model(**batch).logits, expected)
    randomize(model)
    assert not torch.allclose(model(**batch).logits, expected, atol=1e-4)
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, parameter_name
