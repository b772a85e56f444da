"""A value of another type is refused before anything is made of it, with what to write where that can be told."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_peft import EsftConfig, LoraMoeConfig, MoloraConfig, MovConfig, PerftConfig, RoutedConfig, SiraConfig
from moe_peft.methods import METHODS

INTEGERS = "must be an integer"


@pytest.mark.parametrize("config", [LoraMoeConfig, MoloraConfig, SiraConfig, PerftConfig, RoutedConfig])
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("r", "16", f"r='16' {INTEGERS}; write r=16"),
        ("r", 4.5, f"r=4.5 {INTEGERS}, as in r="),
        ("r", True, f"r=True {INTEGERS}, as in r="),
        ("r", None, f"r=None {INTEGERS}, as in r="),
        ("r", torch.tensor(4), f"r=tensor.* {INTEGERS}, as in r="),
        ("num_experts", 4.5, f"num_experts=4.5 {INTEGERS}"),
        ("num_experts", "4", f"num_experts='4' {INTEGERS}.*; write num_experts=4"),
        ("top_k", 2.0, f"top_k=2.0 {INTEGERS} or None; write top_k=2"),
        ("top_k", "none", f"top_k='none' {INTEGERS} or None; write top_k=None"),
        ("lora_alpha", "32", "lora_alpha='32' must be a finite number.*; write lora_alpha=32"),
        ("lora_dropout", None, r"lora_dropout=None must be a finite number, as in lora_dropout=0\.0"),
        ("router_z_loss_coef", float("inf"), "router_z_loss_coef=inf must be a finite number"),
        ("norm_topk_prob", "false", "norm_topk_prob='false' must be True or False; write norm_topk_prob=False"),
        ("use_rslora", 1, "use_rslora=1 must be True or False; write use_rslora=True"),
        ("router", ["top_k"], r"router=\['top_k'\] must be a string"),
        ("target_modules", 5, "target_modules=5 must be a list of strings, a string or None"),
        ("modules_to_save", "lm_head", r"must be a list of strings or None; write modules_to_save=\['lm_head'\]"),
        ("layers_to_transform", ["0"], "must be a list of integers, an integer or None"),
        ("layers_to_transform", "0", "an integer or None; write layers_to_transform=0"),
        ("trainable_token_indices", 3, r"or None; write trainable_token_indices=\[3\]"),
        ("trainable_token_indices", {"embed": 3}, "a dict from strings to lists of integers or None"),
    ],
)
def test_a_value_of_another_type_is_refused_with_what_to_write(config, field, value, message):
    with pytest.raises(ValueError, match=f"^{config.__name__}: .*{message}") as error:
        config(**{field: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (MovConfig, {"head_dim": 16.0}, f"head_dim=16.0 {INTEGERS} or None; write head_dim=16"),
        (EsftConfig, {"experts": {0: [1]}, "num_backbone_experts": "8"}, "write num_backbone_experts=8"),
        (PerftConfig, {"variant": ["R"]}, "must be a string, as in variant='R'"),
        (LoraMoeConfig, {"expert_groups": "0,1"}, "expert_groups='0,1' must be a list of integers or None"),
        (RoutedConfig, {"losses": ["z_loss"]}, "must be a dict from strings to finite numbers or None"),
        (RoutedConfig, {"losses": {"importance": "0.1"}}, "must be a dict from strings to finite numbers or None"),
    ],
)
def test_fields_of_one_method_are_checked_too(config, fields, message):
    with pytest.raises(ValueError, match=f"^{config.__name__}: .*{message}"):
        config(**fields)


@pytest.mark.parametrize("config", METHODS.values())
def test_every_default_is_of_its_type(config):
    assert config().peft_type == config.adapter_type


def test_integers_are_numbers_and_any_collection_is_a_list():
    config = SiraConfig(lora_alpha=16, lora_dropout=0, capacity_factor=np.float64(1.5), target_modules=("q_proj",))
    assert config.scaling == 4 and config.target_modules == {"q_proj"}
    assert LoraMoeConfig(num_experts=2, expert_groups=(0, 1)).expert_groups == [0, 1]
