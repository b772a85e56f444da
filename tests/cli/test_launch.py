"""The verbs that train: which flags are the launcher's, how one process is started, and what the help begins with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException

from moe_peft.cli import launch, main
from moe_peft.cli.shipped import names_of, shipped
from tests.train.tiny_run import environment, make_base, make_data, words, write_run


@pytest.mark.parametrize(
    ("given", "launcher", "script"),
    [
        (["--config", "quickstart", "--moe_r", "4"], [], ["--config", "quickstart", "--moe_r", "4"]),
        (["--num_processes", "2", "--seed", "1"], ["--num_processes", "2"], ["--seed", "1"]),
        (["--num_processes=2", "--use_cpu"], ["--num_processes", "2"], ["--use_cpu"]),
        (["--multi_gpu", "--config", "a.yaml"], ["--multi_gpu"], ["--config", "a.yaml"]),
        (["--gradient_accumulation_steps", "8"], [], ["--gradient_accumulation_steps", "8"]),
    ],
)
def test_flags_go_to_the_launcher_or_to_the_script(given, launcher, script):
    assert launch.split(given, launch_command_parser()) == (launcher, script)


def test_a_configuration_of_the_launcher_has_a_name():
    launcher, _ = launch.split(["--config_file", "fsdp2"], launch_command_parser())
    assert launcher == ["--config_file", str(names_of("accelerate")["fsdp2"])]
    with pytest.raises(ValueError, match=r"--config_file fdsp2: there is no such file.*fsdp2"):
        launch.split(["--config_file", "fdsp2"], launch_command_parser())


def test_several_processes_without_gpus_have_a_configuration_of_the_launcher():
    file = ["--config_file", str(names_of("accelerate")["two_cpu_processes"])]
    for flag in (["--use_cpu"], ["--use_cpu", "true"], ["--use_cpu=true"], ["--use_cpu", "--seed", "1"]):
        assert launch.on_cpus(["--num_processes", "3"], flag) == [*file, "--num_processes", "3"]
    for launcher, own in (
        (["--num_processes", "1"], ["--use_cpu"]),
        (["--num_processes", "2"], ["--use_cpu", "false"]),
        (["--num_processes", "2"], []),
        (["--config_file", "own.yaml", "--num_processes", "2"], ["--use_cpu"]),
        ([], ["--use_cpu"]),
    ):
        assert launch.on_cpus(launcher, own) == launcher


@pytest.mark.parametrize("verb", ["sft", "select-experts"])
def test_one_process_takes_the_place_of_the_command_without_a_word_of_the_launcher(verb, monkeypatch, caplog):
    started = []
    monkeypatch.setattr(launch, "replace_process", lambda command, env: started.append((command, env)) or 7)
    assert main([verb, "--config", "quickstart", "--num_processes", "1"]) == 7
    assert not caplog.records
    ((command, variables),) = started
    script = shipped("train") / f"{verb.replace('-', '_')}.py"
    assert command == [sys.executable, str(script), "--config", "quickstart"]
    assert variables["MOE_PEFT_PROGRAM"] == f"moe-peft {verb}"


def test_the_help_of_a_script_begins_with_the_adapters_flags(capsys):
    assert main(["sft", "--help"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: moe-peft sft --model_name_or_path MODEL")
    order = ["--moe_method", "--moe_num_experts", "--model_name_or_path", "--dataset_name", "--learning_rate"]
    places = [printed.index(f"\n  {flag}") for flag in order]
    assert places == sorted(places)
    assert "--moe-method" not in printed


def test_a_run_by_the_module_trains_and_a_mistake_is_one_line(tmp_path):
    base = make_base(tmp_path / "base")
    data = make_data(tmp_path / "data", [{"text": words(i, 5)} for i in range(8)])
    run = write_run(tmp_path, model_name_or_path=base, dataset_name=data, bf16=None, learning_rate=None)
    command = [sys.executable, "-m", "moe_peft", "sft", "--config", str(run)]
    options = {"capture_output": True, "text": True, "cwd": tmp_path, "env": environment(tmp_path)}
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "learning rate: 0.0002, the default of Routed experts for sft" in done.stdout
    assert f'AutoPeftModelForCausalLM.from_pretrained("{tmp_path}/out")' in done.stdout
    wrong = subprocess.run([*command, "--moe_top_k", "9"], **options)
    assert wrong.returncode == 1 and "Traceback" not in wrong.stderr + wrong.stdout
    last = wrong.stderr.strip().splitlines()[-1]
    assert last.startswith("moe-peft sft: RoutedConfig: top_k=9 must be between 1 and num_experts=4")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SignalException("", signal.SIGINT), 130),
        (SignalException("", signal.SIGTERM), 143),
        (SimpleNamespace(failures={0: SimpleNamespace(exitcode=130)}), 130),
        (SimpleNamespace(failures={0: SimpleNamespace(exitcode=-9)}), 137),
        (SimpleNamespace(failures={1: SimpleNamespace(exitcode=2), 0: SimpleNamespace(exitcode=1)}), 2),
        (RuntimeError(), 1),
    ],
)
def test_the_command_ends_as_its_first_process_or_its_signal_says(error, code):
    assert launch.exit_code(error) == code


@pytest.mark.slow
@pytest.mark.multi_process
def test_ctrl_c_ends_several_processes_with_130_and_one_line(tmp_path):
    base = make_base(tmp_path / "base")
    data = make_data(tmp_path / "data", [{"text": words(i, 5)} for i in range(10)])
    values = {"bf16": None, "use_cpu": None, "max_steps": 100_000, "save_steps": 5, "save_total_limit": 2}
    run = write_run(tmp_path, model_name_or_path=base, dataset_name=data, ddp_find_unused_parameters=False, **values)
    command = [sys.executable, "-m", "moe_peft", "sft", "--config", str(run), "--num_processes", "2", "--use_cpu"]
    log = (tmp_path / "log.txt").open("w+")
    options = {"stdout": log, "stderr": log, "cwd": tmp_path, "env": environment(tmp_path)}
    started = subprocess.Popen(command, start_new_session=True, **options)
    try:
        until = time.monotonic() + 280
        while started.poll() is None and not list(tmp_path.glob("out/checkpoint-*/trainer_state.json")):
            assert time.monotonic() < until
            time.sleep(0.2)
        # As a terminal does: to every process of the group.
        os.killpg(started.pid, signal.SIGINT)
        assert started.wait(120) == 130, (tmp_path / "log.txt").read_text()[-3000:]
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
        log.close()
    printed = (tmp_path / "log.txt").read_text()
    assert printed.count("Interrupted") == 1 and "Traceback" not in printed, printed[-3000:]


@pytest.mark.slow
@pytest.mark.multi_process
def test_several_processes_train_one_adapter_on_a_cpu(tmp_path):
    base = make_base(tmp_path / "base")
    data = make_data(tmp_path / "data", [{"text": words(i, 5)} for i in range(10)])
    values = {"bf16": None, "use_cpu": None, "max_steps": 1, "ddp_find_unused_parameters": False}
    run = write_run(tmp_path, model_name_or_path=base, dataset_name=data, **values)
    command = [sys.executable, "-m", "moe_peft", "sft", "--config", str(run), "--num_processes", "2", "--use_cpu"]
    options = {"capture_output": True, "text": True, "cwd": tmp_path, "env": environment(tmp_path), "timeout": 280}
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("The adapter is in") == 1
    assert (tmp_path / "out/adapter_model.safetensors").is_file()
    states = {path.name for path in (tmp_path / "out/checkpoint-1").glob("rng_state*")}
    assert states == {"rng_state_0.pth", "rng_state_1.pth"}
    wrong = subprocess.run([*command, "--moe_top_k", "9"], **options)
    assert wrong.returncode == 1 and "Traceback" not in wrong.stderr + wrong.stdout
    assert wrong.stderr.count("top_k=9 must be between") == 1
