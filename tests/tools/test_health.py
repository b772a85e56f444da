"""A whole adapter is told from a broken one by its files, and what has not learned is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import moe_peft
from moe_peft.backbone.without_weights import meta_model
from moe_peft.tools.health import inspect_adapter
from tests.contract.cases import tiny_olmoe
from tests.tiny import tiny_llama

SAVED = sorted(
    p
    for p in (Path(__file__).parents[1] / "fixtures/adapters_0_1_0").iterdir()
    if (p / "adapter_config.json").is_file()
)
WEIGHTS = "adapter_model.safetensors"


def saved(folder, config=None, make=tiny_llama, random=True):
    config = config or moe_peft.RoutedConfig(task_type="CAUSAL_LM", num_experts=4, r=2, init_weights=not random)
    get_peft_model(make(), config).save_pretrained(folder)
    return folder


def change(folder, edit):
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize("folder", SAVED, ids=lambda path: path.name)
def test_every_saved_adapter_is_whole(folder):
    health = inspect_adapter(folder)
    assert health.places and health.num_parameters == sum(t.numel() for t in load_file(folder / WEIGHTS).values())
    assert not health.remarks()


@pytest.mark.parametrize(
    ("config", "make"),
    [
        (moe_peft.LoraMoeConfig, tiny_llama),
        (moe_peft.MovConfig, tiny_llama),
        (moe_peft.PerftConfig, tiny_olmoe),
        (moe_peft.ExpertLoraConfig, tiny_olmoe),
    ],
)
def test_an_adapter_has_what_its_base_model_asks_for(config, make, tmp_path):
    saved(tmp_path, config(task_type="CAUSAL_LM", init_weights=False), make)
    health = inspect_adapter(tmp_path, meta_model(make().config))
    assert health.checked_against and not health.remarks()


def test_an_untrained_adapter_is_called_so(tmp_path):
    assert (
        inspect_adapter(saved(tmp_path, random=False)).remarks()[0].startswith("untrained: every expert adds nothing")
    )


@pytest.mark.parametrize("kind", ["normed", "cp_diagonal", "film", "zero_computation"])
def test_an_untrained_adapter_of_every_kind_is_called_so(kind, tmp_path):
    get_peft_model(tiny_llama(), moe_peft.RoutedConfig(num_experts=3, r=2, experts=kind)).save_pretrained(tmp_path)
    assert inspect_adapter(tmp_path).untrained


def test_dead_equal_and_zero_are_named_with_their_place(tmp_path):
    def edit(tensors):
        up, down, router = (
            next(k for k in tensors if "layers.1.mlp.up_proj" in k and k.endswith(e)) for e in (".B", ".A", "weight")
        )
        tensors[up][2] = 0
        tensors[up][1], tensors[down][1] = tensors[up][0], tensors[down][0]
        tensors[router].zero_()

    remarks = inspect_adapter(change(saved(tmp_path), edit)).remarks()
    place = "model.layers.1.mlp.up_proj"
    assert remarks == [
        f"{place}: router.weight is zero throughout",
        f"{place}: experts 2 add nothing",
        f"{place}: experts (0, 1) are equal",
    ]


def test_the_lengths_of_a_routers_rows_are_those_of_the_file(tmp_path):
    health = inspect_adapter(saved(tmp_path))
    (weight,) = [
        t for k, t in load_file(tmp_path / WEIGHTS).items() if "layers.0.mlp.gate_proj" in k and "router" in k
    ]
    (place,) = [place for place in health.places if place.name == "model.layers.0.mlp.gate_proj"]
    lengths = weight.norm(dim=1)
    assert place.router_norms == pytest.approx((lengths.min().item(), lengths.max().item()))


def cut(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def without(ending):
    def edit(tensors):
        del tensors[next(key for key in tensors if key.endswith(ending))]

    return lambda folder: change(folder, edit)


def with_nan(folder):
    change(folder, lambda tensors: next(iter(tensors.values())).view(-1)[:1].fill_(torch.nan))


def other_config(folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 1234}))


BROKEN = {
    "cut": (cut, "is truncated or damaged"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "holds no adapter_model.safetensors"),
    "a router is missing": (without("router.weight"), "lacks 1 tensors, the first is .*router.weight"),
    "a matrix is missing": (without(".B"), r"lacks 1 tensors, the first is .*experts\.B"),
    "not finite": (with_nan, "holds NaN or infinite values in 1 tensors"),
    "another configuration": (other_config, "lora_alpha"),
    "no configuration": (lambda folder: (folder / "adapter_config.json").unlink(), "holds no adapter_config.json"),
    "no folder": (shutil.rmtree, "is no folder"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_adapter_is_refused_with_what_is_wrong(case, tmp_path):
    edit, message = BROKEN[case]
    folder = saved(tmp_path / "adapter")
    edit(folder)
    with pytest.raises(ValueError, match=message):
        inspect_adapter(folder)


def test_a_layer_that_is_missing_whole_is_found_by_the_base_model(tmp_path):
    def edit(tensors):
        for key in [key for key in tensors if "layers.1." in key]:
            del tensors[key]

    change(saved(tmp_path), edit)
    inspect_adapter(tmp_path)
    with pytest.raises(ValueError, match=r"lacks 9 of the tensors that it has on LlamaForCausalLM.*layers\.1\."):
        inspect_adapter(tmp_path, meta_model(tiny_llama().config))


def test_an_adapter_of_peft_itself_is_told_from_ours(tmp_path):
    get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'LORA', which is peft's own"):
        inspect_adapter(tmp_path)
