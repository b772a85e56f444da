"""Experts, their rank and a token's choice may differ between layers; built, described, saved and loaded alike."""

from __future__ import annotations

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model

from moe_peft import LoraMoeConfig, MovConfig, PerftConfig, RoutedConfig, SiraConfig, describe
from moe_peft.config.layer_sizes import layer_places, sizes_at
from moe_peft.place import Place
from tests.tiny import padded_batch, tiny_llama

LAYERS = 4
CASES = {
    "loramoe": lambda: LoraMoeConfig(per_layer={"num_experts": [2, 3]}),
    "sira": lambda: SiraConfig(per_layer={"num_experts": [2, 4], "top_k": [1, 2], "r": [1, 3]}),
    "mov": lambda: MovConfig(per_layer={"num_experts": [2, 4, 6, 8]}),
    "routed": lambda: RoutedConfig(num_experts=4, per_layer={"top_k": [1, 2, 3, 4], "r": [2]}),
    "block": lambda: PerftConfig(per_layer={"num_experts": [4, 3, 2]}),
}


def base():
    return tiny_llama(num_hidden_layers=LAYERS).eval()


def sizes(model) -> list[tuple[str, tuple[int, ...]]]:
    return [
        (name, tuple(p.shape)) for name, p in model.named_parameters() if "_experts." in name or "_router." in name
    ]


@pytest.mark.parametrize("case", CASES)
def test_every_layer_has_its_own_sizes_in_the_model_the_description_and_the_file(case, tmp_path):
    config, batch = CASES[case](), padded_batch([7, 4])
    config.init_weights = False
    described = describe(base(), config)
    model = get_peft_model(base(), config).eval()
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    assert sum(trained) == described.num_parameters == sum(described.parameters)
    for place in described.places:
        own = config.at(place)
        for name, values in config.per_layer.items():
            assert getattr(own, name) == values[place.layer_index * len(values) // LAYERS]
        found = [shape for name, shape in sizes(model) if place.name in name]
        assert found and {shape[0] for shape in found} == {own.num_experts}
        assert "r" not in config.per_layer or {shape[1] for shape in found if len(shape) == 3} == {own.r}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert loaded.peft_config["default"].meaning() == model.peft_config["default"].meaning()
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("layers", [1, 2, 3, 7, 30])
@pytest.mark.parametrize("lengths", [(1,), (4,), (2, 3), (3, 4, 6), (5, 7)])
def test_the_typical_places_have_every_combination_of_sizes_that_layers_can_have(lengths, layers):
    per_layer = {str(n): list(range(n)) for n in lengths}
    typical = [tuple(sizes_at(per_layer, place).values()) for place in layer_places(per_layer)]
    stack = [Place("x", 2, 2, layer_index=i, num_layers=layers) for i in range(layers)]
    assert {tuple(sizes_at(per_layer, place).values()) for place in stack} <= set(typical)
    assert len(typical) == len(set(typical)) <= sum(lengths)


@pytest.mark.parametrize(
    ("config", "mergeable"),
    [
        (lambda: RoutedConfig(router="dense", num_experts=8, per_layer={"num_experts": [1, 1]}), True),
        (lambda: RoutedConfig(router="dense", num_experts=1, per_layer={"num_experts": [1, 1, 1, 2]}), False),
        (lambda: RoutedConfig(router="dense", num_experts=1, per_layer={"r": [2, 4]}), True),
        (lambda: MovConfig(num_experts=1, per_layer={"num_experts": [1, 3]}), False),
    ],
)
def test_the_configuration_says_of_all_layers_whether_a_merge_will_succeed(config, mergeable):
    assert config().mergeable is mergeable
    model = get_peft_model(base(), config())
    if mergeable:
        model.merge_and_unload()
    else:
        with pytest.raises(ValueError, match="cannot be merged"):
            model.merge_and_unload()


MERGEABLE = {
    "default places": {"per_layer": {"num_experts": [1, 1]}},
    "named inside": {"per_layer": {"num_experts": [1]}, "target_modules": ["up_proj"]},
    "a regex": {"per_layer": {"num_experts": [1]}, "target_modules": r".*\.v_proj"},
    "a head of one expert": {"per_layer": {"num_experts": [1]}, "target_modules": ["lm_head"], "num_experts": 1},
    "a head": {"per_layer": {"num_experts": [1]}, "target_modules": ["lm_head", "up_proj"]},
    "a head by a regex": {"per_layer": {"num_experts": [1]}, "target_modules": r".*(up_proj|lm_head)"},
    "more experts somewhere": {"per_layer": {"num_experts": [1, 1, 1, 2]}},
}


@pytest.mark.parametrize("case", MERGEABLE)
def test_a_configuration_says_the_same_fresh_resolved_and_from_its_file_as_the_merge_does(case, tmp_path):
    fresh = RoutedConfig(router="dense", **{"num_experts": 8, **MERGEABLE[case]})
    model = get_peft_model(base(), fresh)
    resolved = model.peft_config["default"]
    resolved.save_pretrained(tmp_path)
    saved = PeftConfig.from_pretrained(tmp_path)
    try:
        model.merge_and_unload()
        merges = True
    except ValueError:
        merges = False
    assert [config.mergeable for config in (fresh, resolved, saved)] == [merges] * 3
    assert merges == (case not in ("a head", "a head by a regex", "more experts somewhere"))


def test_a_resolved_configuration_is_asked_about_the_sizes_that_its_model_has():
    config = RoutedConfig(router="dense", per_layer={"num_experts": [1, 2, 1, 2]})
    model = get_peft_model(tiny_llama(num_hidden_layers=2), config)
    assert not config.mergeable and model.peft_config["default"].mergeable
    model.merge_and_unload()


@pytest.mark.parametrize("num_experts", [1, 8])
def test_places_outside_of_numbered_layers_are_asked_with_the_plain_fields(num_experts):
    targets = {"target_modules": ["down_proj", "lm_head"], "per_layer": {"num_experts": [1, 1]}}
    config = RoutedConfig(router="dense", num_experts=num_experts, **targets)
    assert config.mergeable is (num_experts == 1)
    model = get_peft_model(base(), config)
    if num_experts == 1:
        model.merge_and_unload()
    else:
        with pytest.raises(ValueError, match="lm_head"):
            model.merge_and_unload()


@pytest.mark.parametrize("case", CASES)
def test_the_description_tells_the_sizes_of_every_place(case):
    config = CASES[case]()
    described = describe(base(), config)
    header, *lines = str(described).splitlines()
    assert header.endswith("sizes")
    for place, line in zip(described.places, lines[: len(described.places)], strict=True):
        own = config.at(place)
        assert line.startswith(place.name) and all(f"{name}={getattr(own, name)}" in line for name in config.per_layer)
    assert "sizes" not in str(describe(base(), RoutedConfig())).splitlines()[0]


def test_equal_sizes_are_the_plain_field():
    plain = get_peft_model(base(), RoutedConfig(num_experts=3, r=2))
    listed = get_peft_model(base(), RoutedConfig(num_experts=5, r=4, per_layer={"num_experts": [3, 3], "r": [2]}))
    assert sizes(plain) == sizes(listed)


@pytest.mark.parametrize("count", range(1, 6))
@pytest.mark.parametrize("layers", range(1, 9))
def test_values_are_spread_evenly_from_the_first_layer_to_the_last(layers, count):
    values = list(range(count))
    found = [sizes_at({"r": values}, Place("x", 2, 2, layer_index=i, num_layers=layers))["r"] for i in range(layers)]
    assert found == sorted(found) and found[0] == 0
    assert max(map(found.count, set(found))) - min(map(found.count, set(found))) <= 1
    assert len(set(found)) == min(layers, count)


def test_a_place_outside_of_numbered_layers_keeps_the_plain_fields():
    config = RoutedConfig(num_experts=3, per_layer={"num_experts": [2, 4]})
    assert config.at(Place("lm_head", 2, 2)).num_experts == 3
    assert config.per_layer == {"num_experts": [2, 4]} and config.num_experts == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SiraConfig(per_layer={"num_experts": [2, 8]}),
            "'num_experts': 2.* is none: .*top_k=4 must be between",
        ),
        (lambda: SiraConfig(per_layer={"num_experts": [4, 8], "top_k": [1, 2, 8]}), "is none: .*top_k=8 must be"),
        (lambda: LoraMoeConfig(per_layer={"top_k": [1]}), "names out of 'num_experts', 'r'"),
        (lambda: MovConfig(per_layer={"r": [1]}), "names out of 'num_experts'"),
        (lambda: PerftConfig(variant="E", per_layer={"num_experts": [1]}), "names out of 'r'"),
        (lambda: LoraMoeConfig(per_layer={"r": []}), "lists of 1 to 1024 sizes"),
        (lambda: LoraMoeConfig(per_layer={"r": {1, 2}}), "lists of 1 to 1024 sizes"),
        (lambda: LoraMoeConfig(per_layer={"r": [0]}), "r=0 must be a rank of at least 1"),
        (lambda: LoraMoeConfig(per_layer={}), "None, or a dict"),
        (lambda: LoraMoeConfig(per_layer={"r": 4}), "per_layer=.* must be a dict from strings to lists of integers"),
        (
            lambda: LoraMoeConfig(num_experts=2, expert_groups=[0, 1], per_layer={"num_experts": [2, 4]}),
            "expert_groups",
        ),
    ],
)
def test_sizes_that_a_layer_cannot_have_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
