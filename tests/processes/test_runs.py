"""The runs and launches for models beyond one GPU start in two processes, and take a step with a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel

from tests.processes.test_parallel import tiny_qwen3_moe
from tests.processes.test_trainers import free_port
from tests.processes.together import run_together
from tests.train.tiny_run import ROOT, make_base, make_data, make_tokenizer, words, write_run

pytestmark = [pytest.mark.multi_process, pytest.mark.slow]
RUNS = ("qwen3_30b_a3b_ep_perft_e", "qwen3_30b_a3b_ep_fsdp_perft_r")
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
SCRIPT = ["tests/processes/on_cpu.py", "train/sft.py", "--config"]


def rows() -> list[dict]:
    return [
        {"messages": [{"role": "user", "content": words(n, 4)}, {"role": "assistant", "content": words(n + 50, 4)}]}
        for n in range(12)
    ]


def assert_trained(base, folder: Path) -> None:
    """The folder has a whole adapter, which loads and has moved, and one logged step."""
    state = json.loads((folder / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["global_step"] == 1
    model = PeftModel.from_pretrained(base, folder)
    ups = [own for name, own in model.named_parameters() if name.endswith(".B")]
    assert ups and any(own.abs().max() > 0 for own in ups) and all(torch.isfinite(own).all() for own in ups)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_with_expert_parallelism_trains_saves_and_loads(name, tmp_path):
    base, tokenizer = tiny_qwen3_moe(), make_tokenizer()
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    run = yaml.safe_load((ROOT / f"configs/runs/{name}.yaml").read_text())
    split = run["model_init_kwargs"]["distributed_config"]
    run["model_init_kwargs"]["distributed_config"] = {k: 2 if isinstance(v, int) else v for k, v in split.items()}
    run |= {"model_name_or_path": str(tmp_path / "base"), "dataset_name": make_data(tmp_path / "data", rows())}
    run |= {"use_cpu": True, "bf16": False, "dtype": "float32", "max_steps": 1, "save_steps": 1, "eval_steps": 1}
    run |= {"gradient_accumulation_steps": 1, "warmup_steps": 0, "output_dir": str(tmp_path / "out")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    launch = ["--config_file", "configs/accelerate/two_cpu_processes.yaml", "--main_process_port", str(free_port())]
    run_together([[*LAUNCH, *launch, *SCRIPT, str(tmp_path / "run.yaml")]], timeout=600)
    assert_trained(tiny_qwen3_moe(), tmp_path / "out")


def test_two_machines_train_one_model_with_fsdp(tmp_path):
    launches = yaml.safe_load((ROOT / "configs/accelerate/fsdp2_two_nodes.yaml").read_text())
    launches |= {"use_cpu": True, "num_processes": 2, "mixed_precision": "no", "main_process_port": free_port()}
    del launches["machine_rank"]  # each machine is told its own
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(launches))
    base, data = make_base(tmp_path / "base"), make_data(tmp_path / "data", rows())
    run = write_run(tmp_path, model_name_or_path=base, dataset_name=data, max_steps=1)
    launch = [*LAUNCH, "--config_file", str(tmp_path / "accelerate.yaml")]
    run_together([[*launch, "--machine_rank", str(rank), *SCRIPT, str(run)] for rank in range(2)], timeout=600)
    from tests.tiny import tiny_llama

    assert_trained(tiny_llama(), tmp_path / "out")
