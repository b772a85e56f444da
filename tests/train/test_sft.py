"""`accelerate launch train/sft.py`, from a YAML file to a reloaded adapter, on a tiny model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import make_backbone
import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from tests.train.tiny_run import run_here

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny backbone and the standard library's instructions, made by the project's own scripts."""
    folder = tmp_path_factory.mktemp("inputs")
    settings = make_backbone.BackboneSettings(num_steps=2, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    make_backbone.make_backbone(folder / "backbone", folder / "data", settings=settings)
    return folder


def write_run(inputs: Path, output: Path, **overrides) -> Path:
    """The quickstart's file with a tiny backbone and few steps."""
    run = yaml.safe_load((ROOT / "configs/runs/quickstart.yaml").read_text())
    run |= {
        "model_name_or_path": str(inputs / "backbone"),
        "dataset_name": str(inputs / "data/instructions"),
        "output_dir": str(output),
        "max_steps": 3,
        "logging_steps": 1,
        **overrides,
    }
    output.mkdir(parents=True, exist_ok=True)
    path = output / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def launch(inputs: Path, output: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_cpu_threads_per_process", "1"]
    command += [str(ROOT / "train/sft.py"), "--config", str(write_run(inputs, output))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(inputs / "cache")}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=output)


def test_quickstart_run_reports_saves_and_reloads(inputs, tmp_path):
    result = launch(inputs, tmp_path / "adapter")
    assert result.returncode == 0, result.stderr[-3000:]
    printed = result.stdout
    table, _, rest = printed.partition("trainable parameters")
    assert "model.layers.1.mlp.down_proj" in table and "LoRAMoE: 6 experts of rank 4" in table
    for line in ("held-out loss", "answer before", "answer after", "expert load (% of gate mass)", "import moe_peft"):
        assert line in rest
    assert "all layers, samples of group 1" in rest
    names: dict = {}
    exec("import moe_peft" + rest.split("import moe_peft")[1].split("\n\nreloaded:")[0], names)
    assert names["model"].peft_config["default"].num_experts == 6
    assert "reloaded: largest logit difference 0.0e+00" in rest
    keys = load_file(tmp_path / "adapter/adapter_model.safetensors").keys()
    assert len(keys) == 2 * 3 * 3 and all("loramoe_" in key for key in keys)
    card = ModelCard.load(tmp_path / "adapter/README.md")
    assert "import moe_peft" in card.text and "| learning_rate |" in card.text and "| expert_groups |" in card.text
    assert {result.metric_type for result in card.data.eval_results} >= {"loss"}
    assert "](routing.png)" in card.text and (tmp_path / "adapter/routing.png").is_file()
    assert "[More Information Needed]" not in card.text
    page = (tmp_path / "adapter/routing_report/index.html").read_text()
    assert f"routing         {tmp_path / 'adapter/routing_report/index.html'}" in rest and "Over training" in page


@pytest.mark.parametrize("method", ["sira", "routed"])
def test_other_methods_train_with_checkpointing_and_accumulation(inputs, tmp_path, method):
    flags = ["--moe_method", method, "--gradient_checkpointing", "true", "--gradient_accumulation_steps", "2"]
    run = dict.fromkeys(("moe_expert_groups", "moe_localized_balancing_mode", "moe_group_column"))
    run |= {"moe_localized_balancing_delta": None, "moe_report": False}
    run_here("sft", write_run(inputs, tmp_path / method, **run), *flags)
    assert (tmp_path / method / "adapter_model.safetensors").is_file()


def test_a_configuration_that_cannot_work_stops_before_anything_is_loaded(inputs, tmp_path):
    with pytest.raises(ValueError, match=r"Nearest names: \['down_proj'"):
        run_here("sft", write_run(inputs, tmp_path / "bad", moe_target_modules=["down_prj"]))
    assert not (tmp_path / "bad/adapter_model.safetensors").exists()
