"""Every place that adapters of linear layers choose is called, and attention is told from the rest, on every type."""

from __future__ import annotations

import pytest
from peft import NoMatchingPeftModuleError

from moe_peft import LoraMoeConfig, MoloraConfig, MovConfig, describe
from moe_peft.backbone.attention import attention_names
from moe_peft.backbone.structure import is_below, layer_of
from tests.backbones.cases import base_model, batch_for, marked
from tests.backbones.models import TYPES

CONFIGS = {
    "ffn": lambda: LoraMoeConfig(r=2, num_experts=2),
    "all-linear": lambda: MoloraConfig(r=2, num_experts=2, target_modules="all-linear"),
    "mov": lambda: MovConfig(num_experts=2),
}


@pytest.mark.parametrize("model_type", [marked(model_type) for model_type in TYPES])
def test_every_place_is_called_by_a_forward_pass(model_type):
    model = base_model(model_type)
    described = []
    for build in CONFIGS.values():
        try:
            described.append(describe(model, build(), batch_for(model)))
        except ValueError as error:
            assert "has no linear layer of the kind" in str(error) or "has no key and value" in str(error)
    assert described
    for description in described:
        # No token of the batch may reach an expert that is a module of its own.
        assert not [name for name in description.uncalled if ".experts." not in name]
        modules = dict(model.named_modules())
        for place in description.places:
            assert (place.layer_index, place.num_layers) == (layer_of(place.name, modules) or (None, None))


def test_attention_of_another_name_is_attention():
    model = base_model("nemotron_h")
    attention = {name for name, module in model.named_modules() if type(module).__name__ == "NemotronHAttention"}
    assert attention and attention <= attention_names(model) and all(name.endswith("mixer") for name in attention)
    ffn = {place.name for place in describe(model, CONFIGS["ffn"]()).places}
    vectors = {place.name for place in describe(model, CONFIGS["mov"]()).places}
    assert ffn and not any(is_below(name, attention) for name in ffn)
    keys_and_values = {f"{name}.{leaf}" for name in attention for leaf in ("k_proj", "v_proj")}
    assert {name for name in vectors if is_below(name, attention)} == keys_and_values


def test_nothing_that_matches_is_the_error_of_peft():
    model = base_model("olmoe")
    for fields, message in (
        ({"target_modules": ["nothing"]}, "Target modules .* not found in the base model"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "No modules were targeted for adaptation"),
        ({"target_modules": ["q_proj"], "exclude_modules": ".*"}, "All modules were excluded"),
    ):
        with pytest.raises(NoMatchingPeftModuleError, match=message):
            describe(model, MoloraConfig(num_experts=2, **fields))
