"""A configuration survives its file, and is loaded as no other type and of no newer layout."""

from __future__ import annotations

import json

import pytest
from peft import PeftConfig, PeftType

from moe_peft import LoraMoeConfig, SiraConfig
from tests.adapter_types import ROUTED_SUMS


def test_file_of_another_adapter_type_is_refused_by_the_class_and_loaded_by_peft(tmp_path):
    SiraConfig(num_experts=5).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has peft_type='SIRA', but LoraMoeConfig loads 'LORAMOE'"):
        LoraMoeConfig.from_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is SiraConfig and loaded.num_experts == 5


def test_file_of_a_newer_schema_is_refused(tmp_path):
    LoraMoeConfig().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "schema_version": 2}))
    with pytest.raises(ValueError, match="schema_version=2 must be at most 1; upgrade peft-moe"):
        LoraMoeConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("config", ROUTED_SUMS)
def test_configuration_survives_its_file(config, tmp_path):
    before = config(r=3, num_experts=5, target_modules=["up_proj"], router_z_loss_coef=0.5)
    before.save_pretrained(tmp_path)
    after = config.from_pretrained(tmp_path)
    assert after.to_dict() == before.to_dict()
    assert after.peft_type is PeftType[config.adapter_type]


def test_a_file_in_the_place_of_the_folder_is_refused_and_stays(tmp_path):
    (tmp_path / "adapter").write_text("mine")
    with pytest.raises(ValueError, match=r"save_directory='.*adapter' is a file; name a folder"):
        LoraMoeConfig().save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter").read_text() == "mine"
