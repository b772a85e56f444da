"""An adapter's own tensors are told from all others of its file, and those that start at a known value start there."""

from __future__ import annotations

import pytest
from peft import get_peft_model
from safetensors.torch import load_file

from moe_peft import (
    EsftConfig,
    ExpertLoraConfig,
    LoraMoeConfig,
    MovConfig,
    PerftConfig,
    RoutedConfig,
    routed_layers,
)
from moe_peft.config.adapter_files import WEIGHTS, read_header
from moe_peft.experts import EXPERTS
from moe_peft.tools.adapter_tensors import (
    Starts,
    expert_tensors,
    kind_of_place,
    natural_order,
    tensors_by_place,
)
from tests.contract.cases import tiny_olmoe
from tests.tiny import tiny_llama

CONFIGS = {
    "pairs": LoraMoeConfig(num_experts=2, modules_to_save=["lm_head"]),
    "vectors": MovConfig(num_experts=2),
    **{
        kind: RoutedConfig(num_experts=2, top_k=1, experts=kind, wraps="block" if own.placement else "linear")
        for kind, own in EXPERTS.items()
    },
}
SPARSE = {
    "block": PerftConfig(variant="R", r=2),
    "backbone": PerftConfig(variant="E", r=2),
    "slices": EsftConfig(experts={"1": [1]}),
    "pairs of slices": EsftConfig(experts={"1": [1]}, expert_adapter="lora", r=2),
    "expert pairs": ExpertLoraConfig(r=2, target_modules=["q_proj"]),
}


@pytest.mark.parametrize("kind", [*CONFIGS, *SPARSE])
def test_tensors_have_their_place_and_those_of_a_known_start_begin_there(kind, tmp_path):
    config = {**CONFIGS, **SPARSE}[kind]
    model = get_peft_model(tiny_llama() if kind in CONFIGS else tiny_olmoe(), config)
    model.save_pretrained(tmp_path)
    header, tensors = read_header(tmp_path / WEIGHTS), load_file(tmp_path / WEIGHTS)
    prefix = f"{config.adapter_type.lower()}_"
    places, further = tensors_by_place(header, prefix)
    own = {key for keys in places.values() for key in keys.values()}
    assert own == {key for key in tensors if f".{prefix}" in key}
    assert set(further) == ({"lm_head"} if config.modules_to_save else set())
    experts, starts = expert_tensors(header, prefix), Starts(config)
    assert {place for place, _ in experts.values()} == set(places)
    carrying = {key for key, (_, name) in experts.items() if starts.carries_out(name)}
    banks = [layer.experts["default"] for layer in routed_layers(model)]
    expected = sum(len(bank.up) for bank in banks)
    assert len(carrying) == expected and (expected or kind in ("vectors", "slices"))
    for key, (_, name) in experts.items():
        value = starts.value(name)
        assert value is None or bool((tensors[key] == value).all()), key


def test_a_file_without_one_of_them_is_refused(tmp_path):
    get_peft_model(tiny_llama(), CONFIGS["vectors"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds none of this adapter's tensors"):
        tensors_by_place(read_header(tmp_path / WEIGHTS), "loramoe_")


def test_places_are_sorted_by_their_numbers_and_are_of_one_kind_but_for_them():
    names = [f"model.layers.{n}.mlp.up_proj" for n in (10, 2, 1)]
    assert sorted(names, key=natural_order) == names[::-1]
    assert {kind_of_place(name) for name in names} == {"model.layers.*.mlp.up_proj"}
    assert kind_of_place("encoder.block.3") == "encoder.block.*"
