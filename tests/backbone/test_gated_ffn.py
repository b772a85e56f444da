"""Gated FFNs are told by what their code computes, whatever their layers are called, and nothing else is one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

from moe_peft.backbone.gated_ffn import gated_ffn
from tests.tiny import tiny_gpt2, tiny_llama, tiny_t5

D, INNER = 6, 10


class Gated(nn.Module):
    """A gated FFN in several forms, of which some compute more than the equation."""

    def __init__(self, form: str = "apart", act=F.silu, width: int = INNER) -> None:
        super().__init__()
        joined = form in ("gate_first", "gate_second")
        self.one = nn.Linear(D, 2 * width if joined else width, bias=form == "bias")
        if not joined:
            self.two = nn.Linear(D, width, bias=False)
        self.three, self.form, self.nonlinearity = nn.Linear(width, D), form, act
        if form in ("inner", "outer"):
            self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        if self.form in ("gate_first", "gate_second"):
            u, t = self.one(x).chunk(2, dim=-1)
            u, t = (u, t) if self.form == "gate_first" else (t, u)
        else:
            u, t = self.two(x), self.one(x)
        v = self.nonlinearity(u) * t
        if self.form == "functional":
            v = F.dropout(v, 0.5, self.training)
        if self.form == "clamped":
            v = v.clamp(max=0.5)
        y = self.three(self.dropout(v) if self.form == "inner" else v)
        return self.dropout(y) if self.form == "outer" else y


def computed(roles, ffn, x):
    u, t = roles.read(ffn, x)
    return roles.write(ffn, roles.activate(ffn, u) * t)


@pytest.mark.parametrize("form", ["apart", "bias", "gate_first", "gate_second", "inner", "outer"])
@pytest.mark.parametrize("width", [INNER, D])
def test_the_roles_compute_what_the_module_computes_in_training_too(form, width):
    ffn, x = Gated(form, width=width).double(), torch.randn(2, 3, D).double()
    roles = gated_ffn(ffn)
    assert roles.widths(ffn) == (D, width, D)
    for training in (False, True):
        ffn.train(training)
        results = []
        for compute in (ffn, lambda given: computed(roles, ffn, given)):
            torch.manual_seed(0)
            results.append(compute(x))
        assert torch.equal(*results)


@pytest.mark.parametrize("form", ["functional", "clamped"])
def test_a_module_that_computes_more_is_none(form):
    assert gated_ffn(Gated(form)) is None


def test_it_is_told_without_weights_and_without_a_call_of_the_module():
    ffn = Gated().to("meta")
    ffn.register_forward_hook(lambda *_: pytest.fail("the module was called"))
    before = copy.copy(ffn.__dict__)
    assert gated_ffn(ffn).gate == "two"
    assert ffn.__dict__ == before


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("llama", {}),
        ("qwen3", {}),
        ("gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8}),
        ("phi3", {"pad_token_id": 0}),
        ("glm", {"pad_token_id": 0, "head_dim": 8}),
        ("granite", {}),
        ("olmo2", {}),
    ],
)
def test_decoders_have_one_in_each_layer(model_type, fields):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(model_type, **{**sizes, **heads, **fields}))
    found = [name for name, module in model.named_modules() if gated_ffn(module) is not None]
    assert found == ["layers.0.mlp", "layers.1.mlp"]


def test_t5_has_one_and_ffns_without_a_gate_and_other_modules_are_none():
    found = [name for name, module in tiny_t5().named_modules() if gated_ffn(module) is not None]
    assert len(found) == 4 and all(name.endswith("DenseReluDense") for name in found)
    others = [*tiny_gpt2().modules(), tiny_llama(), tiny_llama().model.layers[0].self_attn, nn.Linear(3, 3)]
    assert not any(gated_ffn(module) for module in others)
