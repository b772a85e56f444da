"""A value of another type is refused before anything is made of it, with what to write where that can be told."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from moe_peft import EsftConfig, LoraMoeConfig, MoloraConfig, MovConfig, PerftConfig, RoutedConfig, SiraConfig
from moe_peft.config.field_types import describe_type, field_types, fits
from moe_peft.methods import METHODS
from tests.adapter_types import ROUTED_SUMS

INTEGERS = "must be an integer"


@pytest.mark.parametrize("config", [*ROUTED_SUMS, PerftConfig])
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
        ("lora_alpha", "32", "lora_alpha='32' must be a finite number.*; write lora_alpha=32"),
        ("lora_dropout", None, r"lora_dropout=None must be a finite number, as in lora_dropout=0\.0"),
        ("router_z_loss_coef", float("inf"), "router_z_loss_coef=inf must be a finite number"),
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
        (SiraConfig, {"top_k": 2.0}, f"top_k=2.0 {INTEGERS} or None; write top_k=2"),
        (PerftConfig, {"top_k": "none"}, f"top_k='none' {INTEGERS} or None; write top_k=None"),
        (MoloraConfig, {"norm_topk_prob": "false"}, "must be True or False; write norm_topk_prob=False"),
        (MovConfig, {"head_dim": 16.0}, f"head_dim=16.0 {INTEGERS} or None; write head_dim=16"),
        (EsftConfig, {"experts": {0: [1]}, "num_backbone_experts": "8"}, "write num_backbone_experts=8"),
        (PerftConfig, {"variant": ["R"]}, "must be a string, as in variant='R'"),
        (LoraMoeConfig, {"expert_groups": "0,1"}, "expert_groups='0,1' must be a list of integers or None"),
        (RoutedConfig, {"losses": ["z_loss"]}, "must be a dict from strings to finite numbers or dicts from"),
        (RoutedConfig, {"losses": {"importance": "0.1"}}, "must be a dict from strings to finite numbers or dicts"),
        (RoutedConfig, {"router_args": [1]}, "router_args=.* must be a dict from strings to values of JSON or None"),
        (RoutedConfig, {"experts_args": {"a": object()}}, "must be a dict from strings to values of JSON or None"),
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


HUGE = [10**400, -(10**400), 2**63, 10**5000]


@pytest.mark.parametrize("config", METHODS.values())
@pytest.mark.parametrize(
    "value", [*HUGE, "[" * 100_000, "9" * 5000, [[[]]], {}, b"x", 1j, float("nan"), object()], ids=lambda value: ""
)
def test_any_value_of_any_field_is_taken_or_refused_by_name(config, value):
    """Fields of peft's own included: what they are set to is used as it stands."""
    for own in dataclasses.fields(config):
        if own.init:
            try:
                config(**{own.name: value})
            except ValueError as error:
                assert own.name in str(error) and len(str(error)) < 1000, (own.name, str(error)[:300])


@pytest.mark.parametrize("config", METHODS.values())
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("inference_mode", "false", "inference_mode='false' must be True or False; write inference_mode=False"),
        ("revision", 5, "revision=5 must be a string or None"),
        ("base_model_name_or_path", ["a"], r"base_model_name_or_path=\['a'\] must be a string or None"),
        ("auto_mapping", "x", "auto_mapping='x' must be a dict or None"),
        ("task_type", 5, "task_type=5 must be a string or None"),
        ("task_type", "x" * 300, "task_type='xx.* must be one of peft's task types"),
        ("peft_type", 5, "peft_type=5 must be a string or None"),
    ],
)
def test_fields_of_peft_are_checked_as_its_own_code_uses_them(config, field, value, message):
    with pytest.raises(ValueError, match=message):
        config(**{field: value})


def test_a_bare_class_variable_of_a_subclass_is_no_field():
    """Python 3.10 evaluates it in no other way than alone."""

    @dataclasses.dataclass
    class Own(LoraMoeConfig):
        note: ClassVar = "mine"
        width: int = 4

    assert field_types(Own)["width"] is int and "note" not in field_types(Own)
    with pytest.raises(ValueError, match="width='4' must be an integer; write width=4"):
        Own(width="4")


def test_any_value_fits_where_a_field_takes_any():
    assert fits({"p": [1, None]}, dict[str, Any]) and not fits({1: 2}, dict[str, Any])
    assert describe_type(dict[str, Any] | None) == "a dict from strings to values of JSON or None"
