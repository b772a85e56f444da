"""A further adapter gets every place that it would get as the first one, or is refused before anything changes."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from moe_peft import LoraMoeConfig, MovConfig, PerftConfig, RoutedConfig, describe
from moe_peft.layers import RoutedLayer
from moe_peft.places.hidden import without_adapters
from tests.contract.cases import METHODS, MODELS
from tests.tiny import tiny_llama

BESIDE = {
    **{name: METHODS[name] for name in ("loramoe", "molora", "routed", "mov", "perft-r", "perft-s", "perft-e")},
    **{name: METHODS[name] for name in ("esft", "expert-lora")},
    "all-linear": lambda: RoutedConfig(num_experts=2, r=2, target_modules="all-linear"),
    "one block": lambda: PerftConfig(num_experts=2, r=2, target_modules=r".*\.1\.(mlp|layer\.\d\.DenseReluDense)"),
    "saved module": lambda: RoutedConfig(num_experts=2, r=2, target_modules=["o_proj"], modules_to_save=["q_proj"]),
    "saved block": lambda: RoutedConfig(num_experts=2, r=2, target_modules=["o_proj"], modules_to_save=["mlp"]),
    "lora": lambda: LoraConfig(r=2, target_modules="all-linear"),
}
FEW = (("perft-r", "one block", "saved module", "saved block", "loramoe"), ("molora", "mov", "all-linear", "perft-e"))
ALL = pytest.mark.slow


def add_by_peft(model, config, name):
    return inject_adapter_in_model(config, model, name)


def add_by_transformers(model, config, name):
    model.add_adapter(config, adapter_name=name)
    return model


def places(model: nn.Module, name: str) -> set[str]:
    """Names, as in a model without adapters, of the modules where an adapter stands."""
    layers = ((place, module) for place, module in model.named_modules() if isinstance(module, RoutedLayer))
    return {place.replace(".base_layer", "") for place, module in layers if name in module.experts}


def try_to_add(base: nn.Module, add, config, name: str) -> set[str] | None:
    """Where the adapter stands; None where it was refused, which must have left the modules as they were."""
    before = [(own, id(module)) for own, module in base.named_modules()]
    try:
        add(base, config, name)
    except (ValueError, TypeError):
        assert before == [(own, id(module)) for own, module in base.named_modules()]
        return None
    return places(base, name)


@pytest.mark.filterwarnings("ignore::moe_peft.MoePeftWarning")
@pytest.mark.parametrize(
    ("model_name", "firsts", "seconds"),
    [
        ("llama", *FEW),
        *(pytest.param(name, BESIDE, BESIDE, marks=ALL, id=f"{name}, all") for name in ("llama", "olmoe", "t5")),
        pytest.param("deepseek_v2", BESIDE, BESIDE, marks=ALL, id="deepseek_v2, all"),
    ],
)
def test_a_further_adapter_has_the_places_of_a_first_one_or_is_refused(model_name, firsts, seconds):
    base = MODELS[model_name].build()
    alone = {name: try_to_add(copy.deepcopy(base), add_by_peft, BESIDE[name](), "b") for name in seconds}
    refused, added = set(), set()
    pairs = itertools.product(firsts, [name for name, found in alone.items() if found and name != "lora"])
    for number, (first, second) in enumerate(pairs):
        model, add = copy.deepcopy(base), (add_by_peft, add_by_transformers)[number % 2]
        if try_to_add(model, add, BESIDE[first](), "a") is None:
            continue
        found = try_to_add(model, add, BESIDE[second](), "b")
        assert found is None or found == alone[second], (first, second)
        (refused if found is None else added).add((first, second))
    assert refused and added


def test_the_refusal_names_the_place_what_hides_it_and_the_ways_out():
    model = tiny_llama()
    model.add_adapter(PerftConfig(num_experts=2, r=2), adapter_name="blocks")
    message = r"down_proj, one of the 6 modules .* lies inside model\.layers\.0\.mlp, which an adapter .* wraps"
    with pytest.raises(ValueError, match=message):
        model.add_adapter(MovConfig(num_experts=2), adapter_name="second")
    with pytest.raises(ValueError, match=message):
        describe(model, MovConfig(num_experts=2))
    model.add_adapter(MovConfig(num_experts=2, exclude_modules=["down_proj"]), adapter_name="second")
    assert len(places(model, "second")) == 4


def test_a_module_that_another_adapter_trains_in_full_is_no_place():
    model = tiny_llama()
    model.add_adapter(RoutedConfig(num_experts=2, r=2, modules_to_save=["q_proj"]), adapter_name="whole")
    for targets in (["q_proj"], "all-linear", r".*q_proj"):
        with pytest.raises(ValueError, match=r"q_proj.* train in full"):
            model.add_adapter(LoraMoeConfig(num_experts=2, r=2, target_modules=targets), adapter_name="second")


def test_an_adapter_around_an_adapted_model_is_asked_too():
    model = get_peft_model(tiny_llama(), PerftConfig(num_experts=2, r=2))
    with pytest.raises(ValueError, match="lies inside"), pytest.warns(UserWarning, match="second time"):
        get_peft_model(model, MovConfig(num_experts=2), adapter_name="outer")


@pytest.mark.filterwarnings("ignore::moe_peft.MoePeftWarning")
def test_the_view_without_adapters_has_the_names_and_weights_of_the_base():
    base = tiny_llama()
    expected = dict(base.named_parameters())
    assert without_adapters(base) is base
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"], trainable_token_indices=[1])
    model = inject_adapter_in_model(RoutedConfig(num_experts=2, r=2), inject_adapter_in_model(lora, base, "a"), "b")
    before = [(name, id(module)) for name, module in model.named_modules()]
    view = without_adapters(model)
    found = dict(view.named_parameters())
    assert found.keys() == expected.keys() and type(view) is type(base)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [(name, id(module)) for name, module in model.named_modules()] == before
