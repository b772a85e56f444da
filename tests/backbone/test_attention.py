"""Attention is found by the names of its projections, whatever the module is called."""

from __future__ import annotations

import pytest
from torch import nn

from moe_peft.backbone.attention import attention_names, projects_queries_keys_values


@pytest.mark.parametrize(
    ("children", "expected"),
    [
        (("q_proj", "k_proj", "v_proj", "o_proj"), True),
        (("q", "k", "v", "o"), True),
        (("query", "key", "value"), True),
        (("q_lin", "k_lin", "v_lin", "out_lin"), True),
        (("to_q", "to_k", "to_v"), True),
        (("wq", "wk", "wv", "wo"), True),
        (("qkv_proj", "o_proj"), True),
        (("query_key_value", "dense"), True),
        (("Wqkv", "Wo"), True),
        (("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"), False),
        (("key", "value", "receptance"), False),
        (("gate_proj", "up_proj", "down_proj"), False),
    ],
)
def test_attention_is_what_projects_queries_keys_and_values(children, expected):
    mixer = nn.ModuleDict({name: nn.Linear(4, 4) for name in children})
    assert projects_queries_keys_values(mixer) is expected
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mixer": mixer})])})
    assert attention_names(model) == ({"layers.0.mixer"} if expected else set())
