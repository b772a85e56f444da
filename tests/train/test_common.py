"""Flags become the adapter's configuration; nothing given is ignored, and every YAML file works."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import common
import pytest
import torch
import yaml
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

from moe_peft import describe
from moe_peft.methods import METHODS
from moe_peft.types import Place

ROOT = Path(__file__).parents[2]
# Fields that have no flag: fixed by the scripts, by peft, or not supported.
WITHOUT_FLAG = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
WITHOUT_FLAG |= {"inference_mode", "schema_version", "target_parameters", "losses"}


def parse(*arguments: str):
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig, common.MoeArguments))
    return parser.parse_args_and_config(list(arguments))


def test_every_field_of_every_method_has_a_flag_and_every_flag_a_field():
    fields = {f.name for config in METHODS.values() for f in dataclasses.fields(config)} - WITHOUT_FLAG
    flags = {f.name for f in dataclasses.fields(common.MoeArguments)} - set(common.SCRIPT_FIELDS)
    assert flags == {common.PREFIX + name for name in fields}


@pytest.mark.parametrize("method", METHODS)
def test_flags_that_are_not_given_keep_the_methods_defaults(method):
    assert common.moe_config(common.MoeArguments(moe_method=method)) == METHODS[method](task_type="CAUSAL_LM")


def test_flags_reach_the_configuration():
    arguments = common.MoeArguments(
        moe_method="routed", moe_router="dense", moe_num_experts=3, moe_target_modules=["all-linear"]
    )
    config = common.moe_config(arguments)
    assert (config.router, config.num_experts, config.target_modules) == ("dense", 3, "all-linear")


def test_flags_of_another_method_are_refused():
    with pytest.raises(ValueError, match=r"--moe_expert_groups .* has no meaning for --moe_method sira"):
        common.moe_config(common.MoeArguments(moe_method="sira", moe_expert_groups=[0, 1]))


def test_flags_of_plain_lora_are_refused():
    with pytest.raises(ValueError, match=r"\['lora_r'\] describe plain LoRA"):
        common.refuse_plain_lora(ModelConfig(lora_r=8))
    common.refuse_plain_lora(ModelConfig())


def test_unknown_keys_of_a_yaml_file_are_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: out\nuse_cpu: true\nbf16: false\nmoe_num_expert: 4\n")
    with pytest.raises(ValueError, match="moe_num_expert"):
        parse("--config", str(path))


@pytest.mark.parametrize("path", sorted((ROOT / "configs/runs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_field_of_a_run_is_parsed_and_builds(path):
    overrides = ["--use_cpu", "true", "--bf16", "false"]
    script, training, model, dataset, moe = parse("--config", str(path), *overrides)
    parsed = {}
    for part in (script, training, model, dataset, moe):
        parsed |= {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
    for key, value in yaml.safe_load(path.read_text()).items():
        if key not in ("bf16", "use_cpu", "report_to"):
            assert str(getattr(parsed[key], "value", parsed[key])) == str(value), key
    config = common.moe_config(moe)
    common.refuse_plain_lora(model)
    kwargs = common.model_init_kwargs(model, training)
    quantization = kwargs.get("quantization_config")
    assert (quantization is not None) == model.load_in_4bit
    if quantization is not None:
        assert quantization.bnb_4bit_quant_type == "nf4" and quantization.bnb_4bit_use_double_quant
    assert config.build(Place("up_proj", 16, 32)).router.num_experts == config.num_experts


def test_the_gpu_run_fits_its_backbone():
    """Qwen3-8B's published dimensions, on the meta device."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    dimensions = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "vocab_size": 151936}
    with torch.device("meta"):
        model = Qwen3ForCausalLM(
            Qwen3Config(**dimensions, num_attention_heads=32, num_key_value_heads=8, head_dim=128)
        )
    *_, moe = parse("--config", str(ROOT / "configs/runs/qwen3_8b_4bit_loramoe.yaml"), "--use_cpu", "--bf16", "false")
    description = describe(model, common.moe_config(moe))
    # Per layer: gate and up 4096 -> 12288, down 12288 -> 4096; N r (in + out) + N in each.
    per_layer = 3 * 6 * 4 * (4096 + 12288) + 6 * (4096 + 4096 + 12288)
    assert len(description.places) == 3 * 36 and description.num_parameters == 36 * per_layer


@pytest.mark.parametrize("path", sorted((ROOT / "configs/methods").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_method_file_builds_and_names_its_source(path):
    text = path.read_text()
    assert "arXiv" in text.splitlines()[0]
    moe = common.MoeArguments(**yaml.safe_load(text))
    assert moe.moe_method == path.stem
    common.moe_config(moe).build(Place("up_proj", 16, 32))


def test_data_needs_exactly_one_source():
    with pytest.raises(ValueError, match="not both"):
        common.load_data(ScriptArguments(), DatasetMixtureConfig())
