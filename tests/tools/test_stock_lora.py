"""A LoRA is read as pairs with its own scales, or refused by what makes it more than pairs."""

from __future__ import annotations

import json
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from moe_peft import MoloraConfig
from moe_peft.tools.stock_lora import read_lora
from tests.tiny import tiny_llama
from tests.tools.exported import trained_lora
from tests.tuner.ways import as_hub_cache


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True, "lora_alpha": 3},
        {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"up_proj": 5}},
    ],
)
def test_pairs_are_the_matrices_that_stock_peft_adds(fields, tmp_path):
    found = read_lora(str(trained_lora(tmp_path / "lora", **fields)))
    stock = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").get_base_model()
    assert len(found.pairs) == 4 and found.rank == 4
    for place, pair in found.pairs.items():
        torch.testing.assert_close(pair.B @ pair.A, stock.get_submodule(place).get_delta_weight("default"))


def test_a_name_on_the_hub_gives_what_its_folder_does(tmp_path, monkeypatch):
    folder = trained_lora(tmp_path / "lora")
    for module in ("huggingface_hub.constants", "huggingface_hub.file_download", "peft.utils.save_and_load"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(as_hub_cache(folder)), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found, expected = read_lora("user/adapter"), read_lora(str(folder))
    assert found.name == "user/adapter" and found.pairs.keys() == expected.pairs.keys()
    for place, pair in expected.pairs.items():
        assert torch.equal(found.pairs[place].A, pair.A) and torch.equal(found.pairs[place].B, pair.B)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
    ],
)
def test_more_than_pairs_is_refused_by_name(fields, message, tmp_path):
    get_peft_model(tiny_llama(), LoraConfig(**{"target_modules": ["q_proj"], **fields})).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_lora(str(tmp_path))


def test_starts_that_change_the_base_other_types_and_broken_files_are_refused(tmp_path):
    folder = trained_lora(tmp_path / "lora")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "pissa"}))
    with pytest.raises(ValueError, match="init_lora_weights='pissa'"):
        read_lora(str(folder))
    (folder / "adapter_config.json").write_text(json.dumps(config))
    own = load_file(folder / "adapter_model.safetensors")
    own.pop(sorted(own)[0])
    save_file(own, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="no whole pair"):
        read_lora(str(folder))
    get_peft_model(tiny_llama(), MoloraConfig()).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="'MOLORA', and a stock LoRA is needed"):
        read_lora(str(tmp_path / "other"))
    with pytest.raises(ValueError, match="no adapter of peft"):
        read_lora(str(tmp_path))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_lora_that_is_not_finite_is_refused_with_the_names_of_its_tensors(value, tmp_path):
    folder = trained_lora(tmp_path / "lora")
    tensors = load_file(folder / "adapter_model.safetensors")
    key = sorted(tensors)[1]
    tensors[key].view(-1)[0] = value
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"NaN or infinite values in 1 tensors: .*{re.escape(key)}"):
        read_lora(str(folder))


@pytest.mark.parametrize("alpha", ["NaN", "Infinity", "1e300", '"8"', "true"])
def test_a_scale_that_is_no_number_is_refused(alpha, tmp_path):
    folder = trained_lora(tmp_path / "lora", lora_alpha=12345)
    config = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(config.replace("12345", alpha))
    with pytest.raises(ValueError, match=r"lora_alpha=.* where a finite number belongs"):
        read_lora(str(folder))
