"""A name that would lose weights, cannot be saved or stands for something else is refused at every entry."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from moe_peft import EsftConfig, LoraMoeConfig, MovConfig, PerftConfig, RoutedConfig
from moe_peft.tuner.names import check_form, check_parts
from tests.contract.cases import tiny_olmoe
from tests.tiny import tiny_llama
from tests.tuner.ways import adapted, assert_unchanged, logits, saved, state_of

SMALL = {"task_type": "CAUSAL_LM", "num_experts": 3, "r": 2}
ROUTED = RoutedConfig(**SMALL)
# The form of a name, and why it cannot be one.
MALFORMED = {
    "": "is empty",
    " ": "is empty",
    "a ": "ends with a space",
    "a.b": "has a dot",
    "..": "has a dot",
    "a/b": "folder that the adapter is saved to",
    "a\\b": "folder that the adapter is saved to",
    "a\nb": "folder that the adapter is saved to",
    "a\0": "folder that the adapter is saved to",
    "x" * 201: "more than 200 bytes",
    "__base__": "stands for the base model",
    "keys": "attribute of torch.nn.ModuleDict",
    "train": "attribute of torch.nn.ModuleDict",
    "type": "attribute of torch.nn.ModuleDict",
    "training": "attribute of torch.nn.ModuleDict",
    "_modules": "attribute of torch.nn.ModuleDict",
    "T_destination": "attribute of torch.nn.ModuleDict",
}
ENTRIES = {
    "get_peft_model": lambda base, name, folder: get_peft_model(base, copy.deepcopy(ROUTED), adapter_name=name),
    "add_adapter of transformers": lambda base, name, folder: base.add_adapter(copy.deepcopy(ROUTED), name),
    "load_adapter of transformers": lambda base, name, folder: base.load_adapter(str(folder), adapter_name=name),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tiny_llama(), ROUTED, tmp_path_factory.mktemp("adapter"))


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_name_is_refused_at_every_entry_before_anything_is_attached(name, folder):
    base = tiny_llama().eval()
    before = state_of(base)
    for entry, add in ENTRIES.items():
        if name or entry != "add_adapter of transformers":  # which takes "default" for an empty name
            with pytest.raises(ValueError, match=f"adapter_name=.*{MALFORMED[name]}.*Nothing has been changed"):
                add(base, name, folder)
            assert_unchanged(base, before)
    model = adapted(tiny_llama(), ROUTED)
    before = state_of(model)
    for add in (
        lambda: model.add_adapter(name, copy.deepcopy(ROUTED)),
        lambda: model.load_adapter(folder, adapter_name=name),
    ):
        with pytest.raises(ValueError, match="adapter_name="):
            add()
        assert_unchanged(model, before)


@pytest.mark.parametrize("name", [None, 3, b"a", ("a",)])
def test_a_name_that_is_no_string_is_a_type_error_that_shows_it(name, folder):
    base, model = tiny_llama().eval(), adapted(tiny_llama(), ROUTED)
    states = state_of(base), state_of(model)
    for add in (
        lambda: get_peft_model(base, copy.deepcopy(ROUTED), adapter_name=name),
        lambda: model.add_adapter(name, copy.deepcopy(ROUTED)),
        lambda: model.load_adapter(folder, adapter_name=name),
    ):
        with pytest.raises(TypeError, match=r"adapter_name=.* must be a string"):
            add()
    assert_unchanged(base, states[0])
    assert_unchanged(model, states[1])


@pytest.mark.parametrize("name", ["default_0", "my adapter", "\u00fc", "experts", "gate", "lora", "-", "1a"])
def test_an_unusual_name_saves_and_loads_under_another(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = adapted(tiny_llama(), ROUTED, name=name)
        model.save_pretrained(tmp_path)
        other = get_peft_model(tiny_llama().eval(), copy.deepcopy(ROUTED))
        other.load_adapter(tmp_path / name, adapter_name="other")
    other.set_adapter("other")
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize(
    ("build", "config", "names"),
    [
        (tiny_llama, ROUTED, ["A", "B", "weight", "mlp", "layers", "0", "up_proj", "routed_experts", "base_layer"]),
        (tiny_llama, LoraMoeConfig(**SMALL), ["loramoe_router", "model", "base_model"]),
        (tiny_llama, MovConfig(task_type="CAUSAL_LM", num_experts=2), ["vectors", "self_attn"]),
        (tiny_olmoe, PerftConfig(**SMALL), ["perft_router", "mlp"]),
        (tiny_olmoe, EsftConfig(experts={"0": [1]}), ["down_proj", "gate_up_proj", "experts", "modules_to_save"]),
    ],
)
def test_a_name_that_is_a_part_of_the_names_of_the_weights_is_refused(build, config, names):
    for name in names:
        base = build().eval()
        before = state_of(base)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(ValueError, match=rf"adapter_name='{name}' is a part of the names of the weights at"):
                get_peft_model(base, copy.deepcopy(config), adapter_name=name)
        assert_unchanged(base, before)


def test_an_adapter_whose_name_is_a_part_of_a_new_ones_weights_is_named():
    # Low-rank experts have no tensor of this name, so it may be theirs, until copies of the experts come.
    lora = EsftConfig(task_type="CAUSAL_LM", experts={"1": [2]}, expert_adapter="lora", r=2)
    model = adapted(tiny_olmoe(), lora, name="down_proj")
    before = state_of(model)
    with pytest.raises(
        ValueError, match=r"The adapter 'down_proj', which the model has, .* saving 'b' would lose them"
    ):
        model.add_adapter("b", EsftConfig(task_type="CAUSAL_LM", experts={"0": [1]}))
    assert_unchanged(model, before)


def test_a_stock_adapter_beside_it_counts_too():
    base = tiny_llama().eval()
    base.add_adapter(LoraConfig(target_modules=["q_proj"]), "routed_experts")
    with pytest.raises(ValueError, match="The adapter 'routed_experts', which the model has"):
        base.add_adapter(copy.deepcopy(ROUTED), "b")


def test_every_attribute_of_a_module_dictionary_is_refused():
    for name in dir(nn.ModuleDict()):
        with pytest.raises(ValueError, match="adapter_name="):
            check_form(name)


def test_parts_are_those_of_the_keys():
    check_parts("a", ["model.x.routed_experts.A"], others=["b"])
    with pytest.raises(ValueError, match="names of the weights at model"):
        check_parts("x", ["model.x.routed_experts.A"])
