"""`accelerate launch train/sft.py --push_to_hub`: what a run leaves on the Hub, and what another process loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import make_backbone
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load
from transformers import AutoModelForCausalLM

from moe_peft import LoraMoeConfig
from tests.hub.client import ROOT, Client, environment
from tests.hub.server import LocalHub

pytestmark = pytest.mark.hub
BASE = "user/base"
PLOT = {"routing.png"}  # of runs that were long enough for an entry of the log
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"}
TWO_PROCESSES = ["--multi_gpu", "--num_processes", "2"]

# Keys of the quickstart's file that a run of `train/reward.py` on these pairs cannot have.
NOT_FOR_REWARDS = ("moe_report", "moe_expert_groups", "moe_localized_balancing_mode", "moe_group_column")


@pytest.fixture(scope="module")
def hub():
    with LocalHub() as hub:
        yield hub
    assert not hub.unknown


@pytest.fixture(scope="module")
def inputs(hub, tmp_path_factory):
    """A tiny backbone, on the Hub as well, and the standard library's instructions."""
    folder = tmp_path_factory.mktemp("inputs")
    settings = make_backbone.BackboneSettings(num_steps=2, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    make_backbone.make_backbone(folder / "backbone", folder / "data", settings=settings)
    with Client(hub, folder / "home") as client:
        client.call("upload", folder=str(folder / "backbone"), name=BASE, token=hub.token)
    return folder


def launch(
    hub,
    inputs: Path,
    output: Path,
    launcher: list[str] = (),
    token: str | None = LocalHub.token,
    script="sft",
    **fields,
):
    run = yaml.safe_load((ROOT / "configs/runs/quickstart.yaml").read_text())
    run |= {
        "model_name_or_path": BASE,
        "dataset_name": str(inputs / "data/instructions"),
        "output_dir": str(output),
        "max_steps": 2,
        "moe_report": False,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "per_device_eval_batch_size": 64,
        "push_to_hub": True,
        **fields,
    }
    run = {name: value for name, value in run.items() if value is not None}
    output.mkdir(parents=True)
    (output / "run.yaml").write_text(yaml.safe_dump(run))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_cpu_threads_per_process", "1", *launcher]
    command += [str(ROOT / f"train/{script}.py"), "--config", str(output / "run.yaml")]
    variables = environment(hub, output.parent / "home", token) | {"HF_DATASETS_CACHE": str(inputs / "cache")}
    return subprocess.run(command, capture_output=True, text=True, env=variables, cwd=output)


def saved_logits(inputs: Path, output: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(inputs / "backbone", dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(model, output).eval()(torch.arange(3, 13)[None]).logits


def check_card(text: str) -> None:
    card = ModelCard(text)
    assert (card.data.library_name, card.data.base_model, card.data.base_model_relation) == ("peft", BASE, "adapter")
    assert {"trl", "sft", "generated_from_trainer", "moe-peft", "loramoe"} <= set(card.data.tags)
    assert "datasets" not in card.data.to_dict() and "pipeline(" not in card.text
    for part in ("import moe_peft", LoraMoeConfig.equation, "| train_loss |", "| eval_loss |", "Cite TRL as"):
        assert part in card.text
    assert "_per_second" not in card.text and "runtime" not in card.text


def test_one_commit_with_our_card_that_another_process_loads(hub, inputs, tmp_path):
    output = tmp_path / "run"
    result = launch(hub, inputs, output, hub_model_id="user/trained", hub_strategy="end")
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"pushed to {hub.url}/user/trained" in result.stdout
    assert hub.messages("user/trained") == ["End of training"] and hub.files("user/trained").keys() - PLOT == FILES
    check_card(hub.files("user/trained")["README.md"].decode())
    assert "import moe_peft" in (output / "README.md").read_text()
    with Client(hub, tmp_path / "another home") as client:
        for way in ("PeftModel", "AutoPeftModel"):
            client.call("load", way=way, base=BASE, name="user/trained", logits=str(tmp_path / "loaded.pt"))
            assert torch.equal(torch.load(tmp_path / "loaded.pt"), saved_logits(inputs, output)), way


@pytest.mark.slow
def test_a_run_without_a_token_stops_before_it_trains(hub, inputs, tmp_path):
    result = launch(hub, inputs, tmp_path / "run", token=None, hub_model_id="user/none")
    assert result.returncode != 0 and "401" in result.stderr
    assert not (tmp_path / "run/adapter_model.safetensors").exists()


@pytest.mark.slow
def test_a_reward_model_is_pushed_with_its_score_head_and_the_right_class_in_the_card(hub, inputs, tmp_path):
    rows = [{"chosen": f"good {i} enough", "rejected": f"bad {i}"} for i in range(8)]
    for split in ("train", "test"):
        path = tmp_path / f"pairs/{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"hub_model_id": "user/reward", "hub_strategy": "end", "dataset_name": str(path.parent)}
    fields |= dict.fromkeys(NOT_FOR_REWARDS)
    result = launch(hub, inputs, tmp_path / "run", script="reward", **fields)
    assert result.returncode == 0, result.stderr[-3000:]
    files = hub.files("user/reward")
    assert files.keys() - PLOT == FILES and "score.weight" in str(load(files["adapter_model.safetensors"]).keys())
    card = ModelCard(files["README.md"].decode())
    assert card.data.pipeline_tag == "text-classification" and "AutoModelForSequenceClassification" in card.text
    assert {"reward-trainer", "moe-peft"} <= set(card.data.tags)


@pytest.mark.slow
@pytest.mark.multi_process
def test_two_processes_push_once_and_the_last_commit_is_ours_after_stock_pushes_of_checkpoints(hub, inputs, tmp_path):
    fields = {"hub_model_id": "user/pair", "save_strategy": "steps", "save_steps": 1, "hub_always_push": True}
    result = launch(hub, inputs, tmp_path / "run", TWO_PROCESSES, ddp_find_unused_parameters=False, **fields)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "run/checkpoint-2/rng_state_1.pth").is_file(), "there was one process"
    messages = hub.messages("user/pair")
    assert messages[-1] == "End of training" and messages.count("End of training") == 1
    assert any(message.startswith("Training in progress") for message in messages)
    check_card(hub.files("user/pair")["README.md"].decode())
    weights = (tmp_path / "run/adapter_model.safetensors").read_bytes()
    assert hub.files("user/pair")["adapter_model.safetensors"] == weights


@pytest.mark.slow
def test_an_upload_that_fails_after_training_leaves_the_adapter_and_says_where(hub, inputs, tmp_path):
    hub.cuts["commit"] = 1
    result = launch(hub, inputs, tmp_path / "run", hub_model_id="user/cut", hub_strategy="end")
    assert result.returncode != 0
    assert "The upload to user/cut did not finish: the connection broke" in result.stderr
    assert f"unchanged in {tmp_path / 'run'}" in result.stderr
    with Client(hub, tmp_path / "another home") as client:
        client.call("push_folder", folder=str(tmp_path / "run"), name="user/cut", token=hub.token)
    assert hub.files("user/cut").keys() - PLOT == FILES
