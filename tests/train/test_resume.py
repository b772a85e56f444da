"""A run that was killed and resumed ends with the weights, bit for bit, of one that never stopped."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests.train.tiny_run import ROOT, environment, make_base, make_data, run_here, words, write_run

# Random numbers in every step: jitter on a top-k router, two kinds of dropout, and a new order in every third step.
RANDOM = {"moe_router_jitter_noise": 0.3, "moe_lora_dropout": 0.2, "moe_expert_dropout": 0.1, "moe_top_k": 2}
STEPS = {"max_steps": 10, "save_steps": 2, "gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine"}
ROWS = {
    "sft": [{"text": words(i, 6)} for i in range(14)],
    "dpo": [{"prompt": words(i, 3), "chosen": f" {words(i + 20, 2)}", "rejected": " w9 w8"} for i in range(14)],
    "kto": [{"prompt": words(i, 3), "completion": f" {words(i + 20, 2)}", "label": i % 2 == 0} for i in range(14)],
    "reward": [{"chosen": words(i, 5), "rejected": words(i + 20, 4)} for i in range(14)],
    "grpo": [{"prompt": words(i, 3)} for i in range(14)],
}
FIELDS = {
    "grpo": {"num_generations": 2, "max_completion_length": 5, "reward_funcs": ["get_soft_overlong_punishment"]},
}
# A time, and a counter of TRL that starts anew with the process.
UNLIKE = ("step_time", "num_tokens")


def make_run(folder: Path, script: str = "sft", **values) -> Path:
    base = make_base(folder / "base", hidden_size=64, intermediate_size=64)
    data = make_data(folder / "data", ROWS[script])
    values = {**RANDOM, **STEPS, **FIELDS.get(script, {}), **values}
    return write_run(folder, model_name_or_path=base, dataset_name=data, **values)


def same_run(left: Path, right: Path) -> bool:
    """Whether two finished runs have the same adapter and routing history, and logged the same in every step."""
    for name in ("adapter_model.safetensors", "routing_history.safetensors"):
        tensors = [load_file(out / name) for out in (left, right)]
        assert tensors[0].keys() == tensors[1].keys()
        if not all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0]):
            return False
    logs = []
    for out in (left, right):
        history = json.loads((out / "checkpoint-10/trainer_state.json").read_text())["log_history"]
        assert len(history) == 10
        logs.append([{k: v for k, v in entry.items() if k not in UNLIKE} for entry in history])
    return logs[0] == logs[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of an uninterrupted run, with its YAML file; its output is in `out`."""
    folder = tmp_path_factory.mktemp("finished")
    run_here("sft", make_run(folder))
    return folder


def resume(finished: Path, out: Path, value: str = "true") -> None:
    run_here("sft", finished / "run.yaml", "--output_dir", str(out), "--resume_from_checkpoint", value)


def start(finished: Path, out: Path, prelude: str = "", *flags: str) -> subprocess.Popen:
    """Run the script in a process of its own, with its lines readable as they are printed."""
    script = str(ROOT / "train/sft.py")
    arguments = ["sft.py", "--config", str(finished / "run.yaml"), "--output_dir", str(out), *flags]
    program = f"import sys, runpy\nsys.path.insert(0, {str(ROOT / 'train')!r})\nsys.argv = {arguments!r}\n"
    program += f"{prelude}\nrunpy.run_path({script!r}, run_name='__main__')\n"
    variables = {**environment(finished), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", program]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables, cwd=finished
    )


@pytest.mark.slow
def test_a_run_killed_at_a_random_moment_resumes_to_the_same_weights(finished, tmp_path):
    seed = int.from_bytes(os.urandom(4), "little")
    moment = random.Random(seed)
    step, delay = moment.randint(3, 6), moment.uniform(0, 0.05)
    print(f"seed {seed}: killed {delay:.3f} s after the log of step {step}")
    process = start(finished, tmp_path)
    logged, printed = 0, ""
    while logged < step:
        line = process.stdout.readline()
        assert line, f"the run ended before step {step}:\n{printed[-3000:]}"
        printed += line
        logged += "'loss'" in line
    time.sleep(delay)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "adapter_model.safetensors").exists()
    again = start(finished, tmp_path, "", "--resume_from_checkpoint", "true")
    printed, _ = again.communicate()
    assert again.returncode == 0, printed[-3000:]
    assert f"Resuming from {tmp_path}/checkpoint-" in printed
    assert same_run(finished / "out", tmp_path)


# Kills the process in the middle of a file of checkpoint-6.
KILL_IN_SAVE = """
import os, signal, torch
save = torch.save
def save_half(content, path, *args, **kwargs):
    save(content, path, *args, **kwargs)
    if str(path).endswith("checkpoint-6/optimizer.pt"):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save_half
"""


def test_a_run_killed_while_it_saves_resumes_from_the_checkpoint_before(finished, tmp_path, capsys):
    process = start(finished, tmp_path, KILL_IN_SAVE)
    printed, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, printed[-3000:]
    assert (tmp_path / "checkpoint-6/optimizer.pt").is_file()
    resume(finished, tmp_path)
    printed = capsys.readouterr().out
    reason = "it has no readable trainer_state.json, which is written last"
    assert f"Not resuming from checkpoint-6, which was not written whole: {reason}." in printed
    assert f"Resuming from {tmp_path}/checkpoint-4." in printed
    assert same_run(finished / "out", tmp_path)


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGES = {
    "no state": (lambda folder: (folder / "trainer_state.json").unlink(), "no readable trainer_state.json"),
    "half a state": (lambda folder: halve(folder / "trainer_state.json"), "no readable trainer_state.json"),
    "half the weights": (lambda folder: halve(folder / "adapter_model.safetensors"), "adapter_model.safetensors is t"),
    "half the optimizer": (lambda folder: halve(folder / "optimizer.pt"), "optimizer.pt is truncated"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no weights"),
    "no optimizer": (lambda folder: (folder / "optimizer.pt").unlink(), "no optimizer"),
    "no scheduler": (lambda folder: (folder / "scheduler.pt").unlink(), "no learning rate"),
    "no random states": (lambda folder: (folder / "rng_state.pth").unlink(), "no random states"),
    "nothing": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), "no readable trainer_state.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_found_before_a_model_is_loaded(damage, finished, tmp_path):
    import checkpoints

    apply, reason = DAMAGES[damage]
    for step in (8, 10):
        shutil.copytree(finished / f"out/checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    apply(tmp_path / "checkpoint-10")
    found, skipped = checkpoints.last_complete(tmp_path)
    assert found == tmp_path / "checkpoint-8"
    assert list(skipped) == ["checkpoint-10"] and reason in skipped["checkpoint-10"]
    with pytest.raises(ValueError, match=r"checkpoint-10: .*\. Name a complete one, or write true"):
        resume(finished, tmp_path, str(tmp_path / "checkpoint-10"))


def test_resuming_without_a_complete_checkpoint_is_refused(finished, tmp_path):
    with pytest.raises(ValueError, match=r"no complete checkpoint\. Leave the flag out to start at step 0"):
        resume(finished, tmp_path)
    with pytest.raises(ValueError, match="there is no such folder"):
        resume(finished, tmp_path, str(tmp_path / "checkpoint-3"))


def test_the_output_folder_of_a_run_stands_for_its_last_whole_checkpoint(finished, capsys):
    import checkpoints

    settings = SimpleNamespace(output_dir="elsewhere", local_process_index=0, max_steps=20, num_train_epochs=3)
    settings.resume_from_checkpoint = str(finished / "out")
    assert checkpoints.resume_point(settings) == str(finished / "out/checkpoint-10")
    assert "nothing is left to train" not in capsys.readouterr().out


@pytest.mark.parametrize(("steps", "epochs", "word"), [(10, 3, "--max_steps 10"), (-1, 1, "--num_train_epochs 1")])
def test_resuming_from_the_end_of_a_run_says_that_nothing_is_left(steps, epochs, word, finished, capsys):
    import checkpoints

    settings = SimpleNamespace(output_dir=str(finished / "out"), local_process_index=0, max_steps=steps)
    settings.num_train_epochs, settings.resume_from_checkpoint = epochs, True
    checkpoints.resume_point(settings)
    assert f"is the end of the run: with {word} nothing is left to train" in capsys.readouterr().out


def test_a_file_in_the_place_of_a_checkpoint_is_refused(finished):
    import checkpoints

    settings = SimpleNamespace(resume_from_checkpoint=str(finished / "run.yaml"), output_dir="out")
    with pytest.raises(ValueError, match=r"run\.yaml is a file\. Name the folder of a checkpoint"):
        checkpoints.resume_point(settings)


SETTINGS = {
    "lora_alpha": ("64", "lora_alpha=64"),
    "top_k": ("1", "top_k=1"),
    "norm_topk_prob": ("true", "norm_topk_prob=True"),
    "routed_scaling_factor": ("0.5", "routed_scaling_factor=0.5"),
    "use_rslora": ("true", "use_rslora=True"),
}


@pytest.mark.parametrize("field", SETTINGS)
def test_a_run_does_not_resume_with_a_setting_that_gives_its_weights_another_meaning(field, finished, tmp_path):
    value, own = SETTINGS[field]
    checkpoint = finished / "out/checkpoint-4"
    flags = ("--output_dir", str(tmp_path), "--resume_from_checkpoint", str(checkpoint), f"--moe_{field}", value)
    with pytest.raises(ValueError, match=f"{field}=.*, but the adapter 'default'.* has .*{re.escape(own)}"):
        run_here("sft", finished / "run.yaml", *flags)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_false_starts_at_step_0(finished, tmp_path):
    shutil.copytree(finished / "out/checkpoint-10", tmp_path / "checkpoint-10")
    run_here("sft", finished / "run.yaml", "--output_dir", str(tmp_path), "--resume_from_checkpoint", "false")
    assert same_run(finished / "out", tmp_path)


QUANTIZED = pytest.param(
    "sft",
    {"load_in_4bit": True, "dtype": "bfloat16"},
    marks=[
        pytest.mark.bnb,
        pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"),
    ],
    id="sft-4bit",
)


@pytest.mark.filterwarnings("ignore:.*compares passes of the model:moe_peft.MoePeftWarning")
@pytest.mark.parametrize(("script", "fields"), [*((s, {}) for s in ROWS if s != "sft"), QUANTIZED])
def test_every_trainer_resumes_bit_for_bit_from_a_checkpoint_in_the_middle_of_an_epoch(script, fields, tmp_path):
    run = make_run(tmp_path, script, **fields)
    run_here(script, run)
    middle = str(tmp_path / "out/checkpoint-4")
    trainer = run_here(script, run, "--output_dir", str(tmp_path / "again"), "--resume_from_checkpoint", middle)
    assert trainer.state.global_step == 10
    assert same_run(tmp_path / "out", tmp_path / "again")
