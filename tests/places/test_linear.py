"""Linear layers: the papers' by structure, all of them without routers, indexers and heads, and the shortest names."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
)

from moe_peft import LoraMoeConfig, MoloraConfig, RoutedConfig, SiraConfig, describe
from moe_peft.layers import RoutedLayer
from moe_peft.places.linear import INDEXER, default_target_modules, linear_names, shortest_endings
from tests.backbones.models import known, tiny_model
from tests.contract.cases import tiny_olmoe, tiny_qwen3
from tests.tiny import padded_batch, tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_t5

# (model, FFN layers, attention layers) by the ends of their names.
STRUCTURES = [
    (tiny_llama, {"gate_proj", "up_proj", "down_proj"}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
    (tiny_qwen3, {"gate_proj", "up_proj", "down_proj"}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
    (tiny_gpt2, {"mlp.c_fc", "mlp.c_proj"}, {"attn.c_attn", "attn.c_proj"}),
    (tiny_t5, {"wi_0", "wi_1", "wo"}, {"q", "k", "v", "o"}),
    (tiny_bert, {"intermediate.dense", "output.dense"}, {"query", "key", "value", "attention.output.dense"}),
]


def matched(model, targets) -> set[str]:
    config = LoraMoeConfig(target_modules=list(targets))
    return {place.name for place in describe(model, config).places}


@pytest.mark.parametrize(("build", "ffn", "attention"), STRUCTURES)
def test_default_targets_are_the_papers_layers_and_no_others(build, ffn, attention):
    model = build()
    linears = {name for name in linear_names(model) if any(part.isdigit() for part in name.split("."))}
    in_attention = {name for name in linears if "attn" in name.lower() or "attention" in name.lower()}
    assert matched(model, default_target_modules(model, "ffn")) == linears - in_attention
    assert matched(model, default_target_modules(model, "attention")) == in_attention
    assert {n for n in in_attention if n.endswith(tuple(attention))} == in_attention
    assert {n for n in linears - in_attention if n.endswith(tuple(ffn))} == linears - in_attention
    everything = matched(model, default_target_modules(model, "all"))
    assert everything == {n for n in linears if not n.endswith(("up_proj", "wi_1"))}


MOE_TYPES = {
    "olmoe": {"num_experts": 4},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "phimoe": {"num_local_experts": 4},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": [1, 1], "num_shared_expert": [1, 1], "head_dim": 8},
    "jetmoe": {"num_local_experts": 4, "kv_channels": 8, "num_key_value_heads": 2},
    "granitemoe": {"num_local_experts": 4},
}


@pytest.mark.parametrize("model_type", MOE_TYPES)
def test_all_linear_and_defaults_leave_backbone_routers_alone(model_type):
    fields = {
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 64,
        "num_experts_per_tok": 2,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(model_type, **{**fields, **MOE_TYPES[model_type]})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    places = [place.name for place in describe(model, LoraMoeConfig(target_modules="all-linear")).places]
    assert places
    for name in places:
        assert not {"router", "gate", "shared_expert_gate", "lm_head", "wg"} & set(name.split(".")), name


def test_fused_experts_leave_no_ffn_layer_to_adapt():
    with pytest.raises(
        ValueError, match=r"no linear layer of the kind 'ffn'.*'q_proj'.*wraps blocks or experts.*'all-linear"
    ):
        get_peft_model(tiny_olmoe(), LoraMoeConfig())
    assert len(describe(tiny_mixtral(), SiraConfig()).places) == 8


@pytest.mark.parametrize(
    ("name", "configs"),
    [
        ("mlp.experts", "configuration that wraps experts"),
        ("mlp", "configuration that wraps blocks"),
    ],
)
def test_targets_that_are_no_linear_layer_name_the_adapters_around_them(name, configs):
    with pytest.raises(TypeError, match=f"{name} .* is not supported.* {configs}"):
        describe(tiny_mixtral(), LoraMoeConfig(target_modules=[name]))


def test_shortest_endings_match_all_names_and_no_other():
    names, others = ["a.0.mlp.proj", "a.1.mlp.proj"], ["a.0.attn.proj", "a.1.attn.proj", "head"]
    assert shortest_endings(names, others) == ["mlp.proj"]
    assert shortest_endings(["x.proj"], ["y.x.proj", "proj"]) == ["x.proj"]


def test_all_linear_leaves_out_the_head_that_scores_a_sequence():
    config = RoutedConfig(task_type="SEQ_CLS", num_experts=2, target_modules="all-linear")
    for model in (tiny_bert(), LlamaForSequenceClassification(tiny_llama().config)):
        names = [place.name for place in describe(model, config).places]
        adapted = get_peft_model(model, copy.deepcopy(config))
        assert names == [name for name, module in model.named_modules() if isinstance(module, RoutedLayer)]
        assert names and not {"score", "classifier"} & set(names)
        assert [n for n, p in adapted.named_parameters() if p.requires_grad and "modules_to_save" in n]


TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
HEADED = [
    (RobertaForSequenceClassification, RobertaConfig, ["classifier.dense", "classifier.out_proj"]),
    (RobertaForTokenClassification, RobertaConfig, ["classifier"]),
    (RobertaForMaskedLM, RobertaConfig, ["lm_head.decoder"]),
    (BertForQuestionAnswering, BertConfig, ["qa_outputs"]),
    (BertForMultipleChoice, BertConfig, ["classifier"]),
    (LlamaForCausalLM, LlamaConfig, ["lm_head"]),
]


@pytest.mark.parametrize(("model_cls", "config_cls", "heads"), HEADED)
def test_all_linear_leaves_out_every_head_and_naming_one_adapts_it(model_cls, config_cls, heads):
    model = model_cls(config_cls(**TINY))
    names = {place.name for place in describe(model, RoutedConfig(target_modules="all-linear")).places}
    assert names and not names & set(heads)
    assert {n for n in names if not any(part.isdecimal() for part in n.split("."))} <= {
        "bert.pooler.dense",
        "lm_head.dense",
    }
    for head in heads:
        places = describe(model, RoutedConfig(target_modules=[head])).places
        assert [(place.name, place.layer_index, place.num_layers) for place in places] == [(head, None, None)]


@pytest.mark.parametrize("model_type", ["deepseek_v32", "glm_moe_dsa"])
@pytest.mark.parametrize("config_cls", [MoloraConfig, RoutedConfig])
def test_what_chooses_the_tokens_of_sparse_attention_is_left_alone_as_nothing_would_train_it(model_type, config_cls):
    if not known(model_type):
        pytest.skip(f"this transformers has no {model_type}")
    targets = "all-linear" if config_cls is RoutedConfig else None
    base = tiny_model(model_type)
    assert any(".index" in name for name, _ in base.named_modules())
    model = get_peft_model(base, config_cls(num_experts=2, target_modules=targets)).train()
    model(**padded_batch([9, 7])).logits.sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert trained and not any(".index" in name for name in trained)
    assert all(grad is not None for grad in trained.values())


def test_indexers_are_known_by_their_names():
    names = ("layers.0.self_attn.indexer.wq_b", "layers.0.self_attn.index_qk_proj", "indexer")
    assert all(INDEXER.search(name) for name in names)
    assert not any(INDEXER.search(name) for name in ("layers.0.mlp.reindex_proj", "model.indices.proj", "a.indexed"))
