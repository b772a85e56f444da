"""Damaged, foreign and misplaced adapter files are refused with a message that says what to do."""

from __future__ import annotations

import copy
import json
from importlib.metadata import version

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from moe_peft import LoraMoeConfig, SiraConfig
from tests.tiny import tiny_llama

# peft 0.20 offers no place to check tensors before they are copied; there torch's own message names the mismatch.
checks_tensors = pytest.mark.skipif(version("peft").startswith("0.20."), reason="peft 0.20 has no hook on loading")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def base():
    return tiny_llama().eval()


@pytest.fixture
def folder(base, tmp_path):
    get_peft_model(copy.deepcopy(base), LoraMoeConfig(num_experts=3)).save_pretrained(tmp_path)
    return tmp_path


def unchanged(base) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in base.state_dict().items()}


def test_truncated_file_is_named_before_the_model_is_touched(base, folder):
    data = (folder / WEIGHTS).read_bytes()
    names = {name for name, _ in base.named_modules()}
    for length in (4, 200, len(data) - 5):
        (folder / WEIGHTS).write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"adapter_model.safetensors cannot be read .* truncated or damaged"):
            PeftModel.from_pretrained(base, folder)
    assert {name for name, _ in base.named_modules()} == names


def test_other_number_of_experts_than_the_configuration_says_is_refused(base, folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "num_experts": 5}))
    with pytest.raises(ValueError, match=r"num_experts, r\) it must begin with \(5, 4\)"):
        PeftModel.from_pretrained(base, folder)


@checks_tensors
def test_missing_tensor_is_named_and_no_weight_changes(base, folder):
    before = unchanged(base)
    state = load_file(folder / WEIGHTS)
    del state["base_model.model.model.layers.1.mlp.up_proj.loramoe_router.weight"]
    save_file(state, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"lack 1 of 18 tensors, the first is .*layers.1.mlp.up_proj.loramoe_router"):
        PeftModel.from_pretrained(copy.deepcopy(base), folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


@checks_tensors
def test_tensors_of_layers_that_the_model_lacks_are_not_dropped_silently(folder):
    with pytest.raises(
        ValueError, match=r"9 tensors more than this model has places for, the first is .*layers\.1\.mlp"
    ):
        PeftModel.from_pretrained(tiny_llama(num_hidden_layers=1), folder)


@checks_tensors
def test_other_width_than_the_model_needs_is_refused(folder):
    wider = tiny_llama(intermediate_size=64)
    with pytest.raises(ValueError, match=r"shape .*48.* but this model needs .*64"):
        PeftModel.from_pretrained(wider, folder)


def test_pickled_weights_are_refused(base, folder):
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="only safetensors are loaded"):
        PeftModel.from_pretrained(base, folder)


def test_foreign_type_is_refused_by_a_named_class(base, folder, tmp_path):
    with pytest.raises(ValueError, match=r"peft_type='LORAMOE', but SiraConfig loads 'SIRA'"):
        SiraConfig.from_pretrained(folder)
    get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match=r"peft_type='LORA', but LoraMoeConfig loads 'LORAMOE'"):
        LoraMoeConfig.from_pretrained(tmp_path / "lora")


def test_newer_layout_is_refused(base, folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "schema_version": 99}))
    with pytest.raises(ValueError, match="schema_version=99 must be at most 1; upgrade peft-moe"):
        PeftModel.from_pretrained(base, folder)
