"""Flags become the adapter's configuration; nothing given is ignored, and every YAML file works."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import common
import pytest
import sft
import yaml
from baselines import BASELINES, describe
from flags import PREFIX, SCRIPT_FIELDS, MoeArguments
from trl import ModelConfig

import moe_peft
from moe_peft.methods import METHODS
from tests.tiny import tiny_llama, tiny_mixtral

ROOT = Path(__file__).parents[2]
# Fields that have no flag: fixed by the scripts or by peft.
WITHOUT_FLAG = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
WITHOUT_FLAG |= {"inference_mode", "schema_version"}
# Filled in from the model.
WITHOUT_FLAG |= {"num_backbone_experts"}


def parse(*arguments: str):
    return sft.make_parser().parse_args_and_config(list(arguments))


def test_every_field_of_every_method_has_a_flag_and_every_flag_a_field():
    fields = {f.name for config in METHODS.values() for f in dataclasses.fields(config)} - WITHOUT_FLAG
    flags = {f.name for f in dataclasses.fields(MoeArguments)} - SCRIPT_FIELDS
    assert flags == {PREFIX + name for name in fields}


@pytest.mark.parametrize("method", METHODS)
def test_flags_that_are_not_given_keep_the_methods_defaults(method):
    assert common.moe_config(MoeArguments(moe_method=method)) == METHODS[method](task_type="CAUSAL_LM")


def test_flags_reach_the_configuration():
    arguments = MoeArguments(
        moe_method="routed", moe_router="dense", moe_num_experts=3, moe_target_modules=["all-linear"]
    )
    config = common.moe_config(arguments)
    assert (config.router, config.num_experts, config.target_modules) == ("dense", 3, "all-linear")


def test_flags_of_another_method_are_refused():
    with pytest.raises(ValueError, match=r"--moe_expert_groups .* has no meaning for --moe_method sira"):
        common.moe_config(MoeArguments(moe_method="sira", moe_expert_groups=[0, 1]))


def test_flags_of_plain_lora_are_refused():
    with pytest.raises(ValueError, match=r"\['lora_r'\] describe plain LoRA"):
        common.refuse_plain_lora(ModelConfig(lora_r=8))
    common.refuse_plain_lora(ModelConfig())


def test_unknown_keys_of_a_yaml_file_are_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: out\nuse_cpu: true\nbf16: false\nmoe_num_expert: 4\n")
    with pytest.raises(ValueError, match=r"run\.yaml: the key 'moe_num_expert' means nothing .* mean moe_num_experts"):
        parse("--config", str(path))


@pytest.mark.parametrize("path", sorted((ROOT / "configs/methods").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_method_file_fits_a_model_and_names_its_source(path, tmp_path):
    text = path.read_text()
    assert path.stem == "none" or re.search(r"arXiv \d{4}\.\d{5}|ICLR \d{4}", "".join(text.splitlines()[:2]))
    moe = MoeArguments(**yaml.safe_load(text))
    assert path.stem.startswith(moe.moe_method)
    if moe.moe_method == "esft":
        moe.moe_experts = str(tmp_path / "expert_config.json")
        moe_peft.ExpertSelection({"0": [1, 3], "1": [2]}).save(moe.moe_experts)
    base = tiny_mixtral() if moe.moe_method in ("perft", "esft", "expert_lora") else tiny_llama()
    assert describe(base, common.moe_config(moe)).num_parameters > 0


def test_every_method_has_a_file():
    names = {path.stem for path in (ROOT / "configs/methods").glob("*.yaml")}
    assert all(any(name.startswith(method) for name in names) for method in (*METHODS, *BASELINES))
    assert all(name.startswith((*METHODS, *BASELINES)) for name in names)
