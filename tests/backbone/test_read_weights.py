"""Modules whose weight is read instead of being called: found in the source, and refused as places."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BloomConfig, BloomForCausalLM

from moe_peft import LoraMoeConfig, MoloraConfig, RoutedConfig, describe
from moe_peft.backbone.read_weights import read_weights
from moe_peft.places.linear import linear_names
from tests.tiny import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
MAMBA2 = {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8, "chunk_size": 16}
BAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
# Type -> (fields, ends of the names of modules that are read).
READ = {
    "mamba": ({"state_size": 4}, {"dt_proj", "x_proj", "out_proj"}),
    "falcon_mamba": ({"state_size": 4}, {"dt_proj", "x_proj", "out_proj"}),
    "mamba2": (MAMBA2, {"out_proj"}),
    "jamba": ({**HEADS, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1}, {"dt_proj"}),
    "bamba": ({**HEADS, **BAMBA, "attn_layer_indices": [1]}, {"out_proj"}),
}


def build(model_type: str) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SMALL, **READ[model_type][0])).eval()


def linears_read(model: nn.Module) -> set[str]:
    return {name for name in read_weights(model) if isinstance(model.get_submodule(name), nn.Linear)}


@pytest.mark.parametrize("model_type", READ)
def test_projections_of_state_space_models_that_are_read_are_no_places(model_type):
    model = build(model_type)
    read = linears_read(model)
    assert {name.rpartition(".")[2] for name in read} == READ[model_type][1]
    inputs = {"input_ids": torch.arange(3, 12)[None]}
    for config in (
        LoraMoeConfig(num_experts=2, r=2),
        MoloraConfig(num_experts=2, r=2, target_modules="all-linear"),
    ):
        description = describe(model, config, inputs)
        assert description.places and not read & {place.name for place in description.places}
        assert description.uncalled == []
    state = {name: type(module) for name, module in model.named_modules()}
    for target in READ[model_type][1]:
        name = next(name for name in read if name.endswith(target))
        with pytest.raises(ValueError, match=r"reads without calling it.*would have no effect"):
            get_peft_model(model, LoraMoeConfig(target_modules=[name], num_experts=2))
    assert state == {name: type(module) for name, module in model.named_modules()}
    adapted = get_peft_model(model, LoraMoeConfig(num_experts=2, r=2, lora_dropout=0.0)).train()
    adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("build_model", [tiny_llama, tiny_gpt2, tiny_t5, tiny_bert])
def test_models_that_call_their_linear_layers_have_none_that_is_read(build_model):
    assert linears_read(build_model()) == set()


def test_parts_of_torch_attention_and_of_its_encoder_layer_are_read():
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.TransformerEncoderLayer(8, 2, 16))
    assert linears_read(model) == {"0.out_proj", "1.self_attn.out_proj", "1.linear1", "1.linear2"}
    for target in ("out_proj", "linear1"):
        with pytest.raises(ValueError, match="would have no effect"):
            get_peft_model(model, RoutedConfig(target_modules=[target]))


@pytest.mark.parametrize("model_type", ["wavlm", "reformer"])
def test_attention_that_reads_its_projections_is_left_alone(model_type):
    wavlm = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 1}
    wavlm |= {"conv_dim": (32,), "conv_stride": (2,), "conv_kernel": (2,), "num_feat_extract_layers": 1}
    wavlm |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": 64}
    reformer = {"hidden_size": 32, "attn_layers": ["lsh"], "axial_pos_embds": False, "num_attention_heads": 2}
    reformer |= {"attention_head_size": 8, "feed_forward_size": 32, "vocab_size": 64}
    model = AutoModel.from_config(
        AutoConfig.for_model(model_type, **{"wavlm": wavlm, "reformer": reformer}[model_type])
    )
    read = {name.rpartition(".")[2] for name in linears_read(model)}
    assert (
        read == {"wavlm": {"q_proj", "k_proj", "v_proj", "out_proj"}, "reformer": {"query_key", "value"}}[model_type]
    )
    assert not read & {name.rpartition(".")[2] for name in linear_names(model)}


def test_a_branch_that_the_settings_rule_out_does_not_count():
    for slices, expected in ((1, set()), (2, {"dense", "dense_4h_to_h"})):
        config = BloomConfig(
            vocab_size=64, hidden_size=32, n_layer=1, n_head=4, pretraining_tp=slices, slow_but_exact=True
        )
        assert {name.rpartition(".")[2] for name in linears_read(BloomForCausalLM(config))} == expected


class Reads(nn.Module):
    """Reads some weights in each of the ways that do, and do not, compute with them."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("called", "kind", "functional", "matrix", "helped", "optional", "early", "late"):
            self.add_module(name, nn.Linear(4, 4))
        self.flag = False

    def forward(self, x, given=None):
        y = self.called(x.to(self.kind.weight.dtype)) + self.kind(x)
        if isinstance(self.kind.weight, torch.Tensor) and self.kind.weight is not None:
            y = y.to(self.kind.weight)
        y = F.linear(y, self.functional.weight, self.functional.bias)
        y = y @ self.matrix.weight.T + self.helper(x)
        y = self.optional(y) if given is None else y @ self.optional.weight
        if not self.flag:
            return self.early(y)
        return y @ self.early.weight

    def helper(self, x):
        return torch.addmm(x, x, self.helped.weight) if self.training else self.helped(x)

    def reset(self):
        nn.init.zeros_(self.late.weight)


def test_what_computes_with_a_weight_is_told_from_what_asks_for_its_kind():
    model = nn.Sequential(Reads())
    assert set(read_weights(model)) == {"0.functional", "0.matrix", "0.helped"}
    model[0].flag = True
    assert set(read_weights(model)) == {"0.functional", "0.matrix", "0.helped", "0.early"}
    with torch.device("meta"):
        assert set(read_weights(nn.Sequential(Reads()))) == {"0.functional", "0.matrix", "0.helped"}


def test_classes_without_source_say_nothing():
    namespace: dict = {"nn": nn}
    exec("class Made(nn.Module):\n    def forward(self, x):\n        return x @ self.a.weight\n", namespace)
    model = namespace["Made"]()
    model.a = nn.Linear(2, 2)
    assert read_weights(nn.Sequential(model)) == {}
