"""A configuration is what its user wrote, whatever models it has been put on."""

from __future__ import annotations

from copy import deepcopy

import pytest
from peft import get_peft_model, inject_adapter_in_model

from moe_peft import LoraMoeConfig, MoloraConfig, MovConfig, PerftConfig, RoutedConfig, SiraConfig
from tests.tiny import tiny_gpt2, tiny_llama

CONFIGS = [
    LoraMoeConfig(num_experts=3, r=2),
    MoloraConfig(num_experts=3, r=2),
    SiraConfig(num_experts=3, top_k=2, r=2),
    MovConfig(num_experts=3),
    PerftConfig(variant="R", num_experts=3, top_k=1, r=2),
    RoutedConfig(num_experts=3, r=2, target_modules="all-linear"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.method)
@pytest.mark.parametrize("inject", [get_peft_model, lambda model, config: inject_adapter_in_model(config, model)])
def test_one_configuration_serves_models_of_different_architectures(config, inject):
    written = deepcopy(config.to_dict())
    for build in (tiny_llama, tiny_gpt2, tiny_llama):
        model = inject(build(), config)
        assert any("_experts." in name for name, _ in model.named_parameters())
        after = {**config.to_dict(), "base_model_name_or_path": None, "auto_mapping": None}
        assert after == {**written, "base_model_name_or_path": None, "auto_mapping": None}


def test_the_model_keeps_the_configuration_with_its_places():
    config = LoraMoeConfig(num_experts=3, r=2)
    model = get_peft_model(tiny_llama(), config)
    assert config.target_modules is None
    assert model.peft_config["default"].target_modules == {"gate_proj", "up_proj", "down_proj"}
