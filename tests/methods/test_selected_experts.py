"""Selected experts: read in any form, and refused in a model that they were not selected in."""

from __future__ import annotations

import pytest

from moe_peft import EsftConfig, ExpertLoraConfig
from moe_peft.place import MoeLayer

TYPES = [EsftConfig, ExpertLoraConfig]


def layers(*sizes: int, part: str = "model") -> list[MoeLayer]:
    return [
        MoeLayer(index, f"{part}.layers.{index}.mlp.experts", None, None, (), size, 4, 4)
        for index, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("cls", TYPES)
@pytest.mark.parametrize("written", [{"0": [3, 1]}, {0: [1, 3]}, {"00": (3, 1)}])
def test_layers_are_strings_and_ids_ascend_whichever_way_they_were_written(cls, written):
    config = cls(experts=written)
    assert config.experts == {"0": [1, 3]}
    (layer, other) = layers(4, 4)
    assert config.adapts(layer) and not config.adapts(other)


@pytest.mark.parametrize("cls", TYPES)
def test_layers_without_a_selected_expert_are_left_out(cls):
    config = cls(experts={"0": [], "1": [2]})
    assert [layer.index for layer in config.selected_layers(layers(4, 4, 4))] == [1]
    assert config.num_backbone_experts == 4


@pytest.mark.parametrize("cls", TYPES)
@pytest.mark.parametrize(
    ("experts", "sizes", "message"),
    [
        ({"0": []}, (4,), "experts=.* must be a selection"),
        ({"2": [0]}, (4, 4), r"of layers with experts, \[0, 1\]; layer 2 has none"),
        ({"1": [4]}, (4, 4), "below 4 in layer 1, which 4 is not"),
    ],
)
def test_a_selection_that_the_model_has_not_is_refused(cls, experts, sizes, message):
    with pytest.raises(ValueError, match=message):
        cls(experts=experts).selected_layers(layers(*sizes))


@pytest.mark.parametrize("cls", TYPES)
def test_a_model_with_other_numbers_of_experts_is_another_model(cls):
    config = cls(experts={"0": [0]}, num_backbone_experts=8)
    with pytest.raises(ValueError, match=r"num_backbone_experts=8 must be the model's, .4.: .* another model"):
        config.selected_layers(layers(4, 4))


@pytest.mark.parametrize("cls", TYPES)
def test_two_stacks_with_the_same_layer_numbers_cannot_be_told_apart(cls):
    both = [*layers(4, part="encoder"), *layers(4, part="decoder")]
    with pytest.raises(ValueError, match=r"encoder.layers.0.* and decoder.layers.0.* both belong to layer 0"):
        cls(experts={"0": [0]}).selected_layers(both)
