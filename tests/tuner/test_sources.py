"""A folder and a name on the Hub are looked up alike, and only adapters of this package are looked into."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from moe_peft import RoutedConfig
from moe_peft.tuner.sources import download_options, meaning_beside, open_weights, routed_config_class
from tests.tiny import tiny_llama
from tests.tuner.ways import as_hub_cache, saved

ROUTED = RoutedConfig(num_experts=3, r=2)


def test_options_of_downloading_are_told_from_others():
    given = {"revision": "main", "token": "x", "is_trainable": True, "repo_id": "a", "subfolder": "b"}
    assert download_options(given) == {"revision": "main", "token": "x", "subfolder": "b"}


def test_types_are_told_apart(tmp_path):
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    saved(tiny_llama(), ROUTED, tmp_path / "outer" / "inner")
    assert routed_config_class(str(tmp_path / "lora"), {}) is None
    assert routed_config_class(str(tmp_path / "outer"), {"subfolder": "inner"}) is RoutedConfig
    assert routed_config_class(str(tmp_path / "missing"), {}) is None
    assert meaning_beside(str(tmp_path / "lora"), {}) is None
    assert meaning_beside(str(tmp_path / "outer" / "inner"), {})["num_experts"] == 3


def test_a_folder_and_a_name_on_the_hub_give_the_same(tmp_path):
    folder = saved(tiny_llama(), ROUTED, tmp_path / "adapter")
    options = {"cache_dir": str(as_hub_cache(folder))}
    assert routed_config_class("user/adapter", options) is RoutedConfig
    assert open_weights("user/adapter", options).shapes == open_weights(str(folder), {}).shapes
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"user/adapter has no adapter_model.safetensors .* only safetensors are loaded"
    ):
        open_weights("user/adapter", options)
    with pytest.raises(ValueError, match=r"holds no adapter_model\.safetensors"):
        open_weights(str(folder), {})


def test_a_compressed_adapter_of_the_hub_names_the_way_back(tmp_path):
    folder = saved(tiny_llama(), ROUTED, tmp_path / "adapter")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_compressed.safetensors")
    options = {"cache_dir": str(as_hub_cache(folder))}
    with pytest.raises(ValueError, match=r"moe-peft decompress user/adapter --output ADAPTER"):
        open_weights("user/adapter", options)


def test_keys_are_renamed_as_peft_renames_them(tmp_path):
    save_file({"base_model.model.old.x": torch.zeros(1), "base_model.model.y": torch.zeros(2)}, tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "adapter_model.safetensors")
    shapes = open_weights(str(tmp_path), {}, {r"^old\.": "new."}).shapes
    assert shapes == {"base_model.model.new.x": (1,), "base_model.model.y": (2,)}
