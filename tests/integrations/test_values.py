"""Numbers of parts that may change: every name that a part declares is one of its numbers, held by configurations."""

from __future__ import annotations

import pytest
from peft import get_peft_model

from moe_peft import RoutedConfig
from moe_peft.integrations.values import get_value, known_values, parts_with, set_value, with_value, write_value
from tests.tiny import OneLinear

DROPOUTS = {"expert_dropout", "lora_dropout"}
FORMS = [
    ({}, {"expert_dropout", "lora_dropout", "router_jitter_noise", "top_k"}),
    ({"router": "top_p"}, {"expert_dropout", "lora_dropout", "p", "router_jitter_noise"}),
    ({"gate": "gumbel", "scorer": "centroid"}, {"expert_dropout", "lora_dropout", "tau", "top_k"}),
    (
        {"router": "dense", "experts": "shared_down"},
        {"down_dropout", "expert_dropout", "lora_dropout", "router_jitter_noise"},
    ),
    ({"router": "sparsemixer"}, {"expert_dropout", "jitter_eps", "lora_dropout", "router_jitter_noise", "top_k"}),
    ({"router": "capacity"}, {"capacity_factor", "expert_dropout", "lora_dropout", "router_jitter_noise", "top_k"}),
]


@pytest.mark.parametrize(("fields", "names"), FORMS)
def test_every_name_is_set_and_read_and_belongs_to_the_configuration(fields, names):
    config = RoutedConfig(target_modules=["linear"], num_experts=4, **fields)
    model = get_peft_model(OneLinear(7, 5), config)
    own = model.peft_config["default"]
    assert set(known_values(model)) == names
    for name in names:
        value = 2 if name == "top_k" else 0.25
        for part in parts_with(model, name):
            set_value(part, name, value)
            assert get_value(part, name) == value
        before = dict(vars(own))
        assert with_value(own, name, value) is not own and vars(own) == before
        write_value(own, name, value)
        held = {**vars(own), **(own.router_args or {}), **(own.experts_args or {})}
        assert held[name] == value


def test_numbers_that_layers_have_each_and_names_that_nothing_has_are_refused():
    config = RoutedConfig(per_layer={"top_k": [1, 2]})
    with pytest.raises(ValueError, match="per_layer gives each layer its own top_k"):
        with_value(config, "top_k", 2)
    with pytest.raises(ValueError, match="neither a field of RoutedConfig nor an option of its parts"):
        with_value(config, "warmth", 2)
