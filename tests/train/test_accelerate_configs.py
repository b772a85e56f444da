"""Every file of configs/accelerate is what accelerate makes of it: its own loader, launcher and plugins read them."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from accelerate import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from peft import get_peft_model
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from moe_peft import RoutedConfig
from tests.tiny import tiny_llama
from tests.train.tiny_run import (
    ROOT,
    assert_trained,
    launch,
    log_entries,
    logits,
    make_base,
    make_data,
    reloaded,
    words,
    write_run,
)

FOLDER = ROOT / "configs/accelerate"
# File -> distributed type, processes, mixed precision.
EXPECTED = {
    "single_process": (DistributedType.NO, 1, "no"),
    "two_cpu_processes": (DistributedType.MULTI_GPU, 2, "no"),
    "ddp": (DistributedType.MULTI_GPU, 8, "bf16"),
    "fsdp2": (DistributedType.FSDP, 8, "bf16"),
    "fsdp2_two_nodes": (DistributedType.FSDP, 16, "bf16"),
    "zero2": (DistributedType.DEEPSPEED, 8, "bf16"),
    "zero3": (DistributedType.DEEPSPEED, 8, "bf16"),
}


def launch_arguments(name: str):
    command = ["--config_file", str(FOLDER / f"{name}.yaml"), "train/sft.py", "--config", "run.yaml"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(command))
    return arguments


def launch_environment(name: str, monkeypatch) -> None:
    """Set the variables that a launched process finds."""
    arguments = launch_arguments(name)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ""
        _, variables = prepare_deepspeed_cmd_env(arguments)
    else:
        variables = prepare_multi_gpu_env(arguments)
    for key, value in variables.items():
        monkeypatch.setenv(key, value)


def test_every_file_is_known_to_these_tests():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerates_own_loader_reads_the_file(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert (config.distributed_type, config.num_processes, config.mixed_precision) == EXPECTED[name]
    assert config.use_cpu == (name == "two_cpu_processes")
    assert config.num_machines == (2 if name == "fsdp2_two_nodes" else 1)
    assert f"--config_file configs/accelerate/{name}.yaml" in (FOLDER / f"{name}.yaml").read_text().splitlines()[0]


@pytest.mark.parametrize("name", EXPECTED)
def test_the_launcher_starts_the_form_that_the_file_names(name):
    arguments = launch_arguments(name)
    starts = (arguments.multi_gpu, arguments.use_fsdp, arguments.use_deepspeed)
    forms = {
        "ddp": (1, 0, 0),
        "two_cpu_processes": (1, 0, 0),
        "fsdp2": (0, 1, 0),
        "fsdp2_two_nodes": (0, 1, 0),
        "zero2": (0, 0, 1),
        "zero3": (0, 0, 1),
    }
    assert starts == forms.get(name, (0, 0, 0))


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2_two_nodes"])
def test_fsdp2_splits_by_decoder_layer_and_saves_one_complete_file(name, monkeypatch):
    launch_environment(name, monkeypatch)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading and plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert not plugin.activation_checkpointing
    plugin.set_auto_wrap_policy(get_peft_model(tiny_llama(), RoutedConfig(task_type="CAUSAL_LM", num_experts=4)))
    assert plugin.auto_wrap_policy.keywords == {"transformer_layer_cls": {LlamaDecoderLayer}}


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_configurations_become_deepspeeds_own(stage, monkeypatch):
    launch_environment(f"zero{stage}", monkeypatch)
    plugin = DeepSpeedPlugin()
    zero = plugin.deepspeed_config["zero_optimization"]
    assert zero["stage"] == stage and plugin.zero3_init_flag == plugin.is_zero3_init_enabled() == (stage == 3)
    assert zero["stage3_gather_16bit_weights_on_model_save"] == (stage == 3)
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == "none"
    # The trainer fills these in from its own arguments.
    for key in ("gradient_accumulation_steps", "gradient_clipping", "train_micro_batch_size_per_gpu"):
        assert plugin.deepspeed_config[key] == "auto"


@pytest.mark.slow
@pytest.mark.multi_process
def test_two_cpu_processes_really_are_two_and_train_one_adapter(tmp_path):
    base = make_base(tmp_path / "base")
    data = make_data(tmp_path / "data", [{"text": words(i, 6)} for i in range(10)])
    checkpointing = {"gradient_checkpointing": True, "ddp_find_unused_parameters": False}
    run = write_run(tmp_path, model_name_or_path=base, dataset_name=data, save_steps=3, **checkpointing)
    two = ("--config_file", str(FOLDER / "two_cpu_processes.yaml"))
    printed = launch("sft", run, launcher=two)
    assert printed.count("Routed experts: 4 experts") == 1
    out = tmp_path / "out"
    assert sorted(path.name for path in (out / "checkpoint-3").glob("rng_state*")) == [
        "rng_state_0.pth",
        "rng_state_1.pth",
    ]
    # Two processes see two batches of two in every step: 3 steps are 12 of the 8 rows, one and a half epochs.
    assert log_entries(out / "checkpoint-3", "epoch")[-1] == 1.5
    assert len(load_file(out / "adapter_model.safetensors")) == 3 * 6


@pytest.mark.multi_process
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_files_train_save_whole_and_resume_on_two_processes(stage, tmp_path):
    base = make_base(tmp_path / "base")
    data = make_data(tmp_path / "data", [{"text": words(i, 6)} for i in range(10)])
    run = write_run(tmp_path, model_name_or_path=base, dataset_name=data)
    zero = ("--config_file", str(FOLDER / f"zero{stage}.yaml"), "--num_processes", "2", "--mixed_precision", "no")
    launch("sft", run, "--max_steps", "2", launcher=zero)
    launch("sft", run, "--resume_from_checkpoint", "true", launcher=zero)
    out = tmp_path / "out"
    assert_trained(out, num_tensors=3 * 6)
    assert {path.name for path in (out / "checkpoint-3").glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    assert logits(reloaded(base, out)).shape == (2, 7, 64)
