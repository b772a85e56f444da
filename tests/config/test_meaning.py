"""Configurations mean the same where the same tensors compute the same, and tell it in JSON's types."""

from __future__ import annotations

import dataclasses
import json

import pytest

from moe_peft import EsftConfig, LoraMoeConfig, MovConfig, PerftConfig, RoutedConfig, SiraConfig
from moe_peft.config.meaning import plain
from moe_peft.methods import METHODS

# What changes how an adapter starts, is trained, placed or computed, and not what its tensors compute.
FREE = {"lora_dropout": 0.3, "init_weights": False, "experts_implementation": "eager", "target_modules": ["q_proj"]}
FREE |= {"router_aux_loss_coef": 0.7, "router_z_loss_coef": 0.1, "load_balancing_scope": "micro_batch"}
FREE |= {"router_jitter_noise": 0.1, "expert_dropout": 0.2, "modules_to_save": ["x"], "exclude_modules": ["y"]}
FREE |= {"inference_mode": True, "base_model_name_or_path": "a", "task_type": "CAUSAL_LM", "revision": "main"}


@pytest.mark.parametrize("name", METHODS)
def test_it_is_of_json_and_names_the_type(name):
    meaning = METHODS[name]().meaning()
    assert meaning == json.loads(json.dumps(meaning)) and meaning["adapter_type"] == METHODS[name].adapter_type


@pytest.mark.parametrize("name", METHODS)
def test_start_training_places_and_speed_do_not_count(name):
    cls = METHODS[name]
    own = {entry.name for entry in dataclasses.fields(cls)}
    base = cls(**({"expert_adapter": "lora"} if name == "esft" else {}))
    free = {key: value for key, value in FREE.items() if key in own}
    assert dataclasses.replace(base, **free).meaning() == base.meaning()


@pytest.mark.parametrize(
    ("base", "change"),
    [
        (LoraMoeConfig(), {"lora_alpha": 16}),
        (LoraMoeConfig(), {"use_rslora": True}),
        (LoraMoeConfig(), {"routed_scaling_factor": 2.0}),
        (SiraConfig(), {"top_k": 2}),
        (SiraConfig(), {"norm_topk_prob": True}),
        (SiraConfig(), {"capacity_factor": None}),
        (RoutedConfig(), {"router": "capacity"}),
        (RoutedConfig(), {"experts": "bottleneck"}),
        (RoutedConfig(experts="bottleneck"), {"activation": "relu"}),
        (RoutedConfig(), {"wraps": "block"}),
        (PerftConfig(), {"variant": "D"}),
        (EsftConfig(experts={"1": [0]}), {"experts": {"1": [1]}}),
        (EsftConfig(experts={"1": [0]}), {"expert_adapter": "lora"}),
        (MovConfig(), {"router_granularity": "token"}),
        (MovConfig(), {"router_input": "hidden"}),
        (MovConfig(), {"feedforward_modules": ["down_proj"]}),
    ],
)
def test_what_changes_the_function_counts(base, change):
    try:
        other = dataclasses.replace(base, **change)
    except ValueError:  # fields that were filled in belong to the variant before
        other = type(base)(**change)
    assert other.meaning() != base.meaning()


def test_it_survives_the_file(tmp_path):
    config = RoutedConfig(num_experts=3, target_modules=["b", "a"], lora_alpha=3)
    config.save_pretrained(tmp_path)
    assert RoutedConfig.from_pretrained(tmp_path).meaning() == config.meaning()


def test_collections_and_numbers_become_those_of_json():
    assert plain({"a": {2, 1}, 3: (1.0, None)}) == {"a": [1, 2], "3": [1.0, None]}


def test_a_field_of_a_subclass_counts_unless_it_says_otherwise():
    @dataclasses.dataclass
    class Own(LoraMoeConfig):
        power: int = 2
        lora_dropout: float = 0.5

    assert Own().meaning()["power"] == 2 and "lora_dropout" not in Own().meaning()
