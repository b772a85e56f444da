"""SFTTrainer under `accelerate launch`: two processes save the adapter that one saves, and log the same routing."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

from moe_peft.telemetry.history import RoutingHistory
from tests.tiny import padded_batch, tiny_llama

pytestmark = pytest.mark.multi_process

DDP = {"distributed_type": "MULTI_GPU", "use_cpu": True, "num_processes": 2, "num_machines": 1}
FSDP = {
    **DDP,
    "distributed_type": "FSDP",
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "fsdp_state_dict_type": "FULL_STATE_DICT",
        "fsdp_reshard_after_forward": True,
        "fsdp_cpu_ram_efficient_loading": False,
    },
}
SINGLE = {"distributed_type": "NO", "use_cpu": True, "num_processes": 1, "num_machines": 1}
SHARDED = {**FSDP, "fsdp_config": {**FSDP["fsdp_config"], "fsdp_state_dict_type": "SHARDED_STATE_DICT"}}
FROM_ONE = {**FSDP, "fsdp_config": {**FSDP["fsdp_config"], "fsdp_cpu_ram_efficient_loading": True}}
LAUNCHES = {"one": SINGLE, "ddp": DDP, "fsdp": FSDP, "sharded": SHARDED, "fsdp-from-one": FROM_ONE}
for stage in (2, 3):
    # DeepSpeed finds that there is no GPU by itself, and its launcher is not told so.
    zero = {"zero_stage": stage, "zero3_init_flag": stage == 3}
    LAUNCHES[f"zero{stage}"] = {**DDP, "distributed_type": "DEEPSPEED", "use_cpu": False, "deepspeed_config": zero}
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


def free_port() -> int:
    """A port below those that the system gives to outgoing connections, which would take it before it is bound."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            port = random.SystemRandom().randrange(20_000, 32_000)
            probe.bind(("127.0.0.1", port))
            return port


# Accumulation and scope of the balance loss.
WHOLE, LOCAL, WINDOW = "1-global_batch", "1-micro_batch", "2-accumulation_window"


def launch(folder: Path, how: str, *settings: str, method: str = "routed") -> Path:
    """Train with accelerate's launcher, once for each setting, in a folder of its own."""
    target = folder / f"{how}-{method}"[:40]
    target.mkdir()
    config = target / "accelerate.yaml"
    text = yaml.safe_dump({"compute_environment": "LOCAL_MACHINE", "mixed_precision": "no", **LAUNCHES[how]})
    config.write_text(text if method == "routed" else text.replace("LlamaDecoderLayer", "OlmoeDecoderLayer"))
    run_script(config, "sft_script", str(target), method, *settings)
    return target


def run_script(config: Path, script: str, *arguments: str) -> None:
    """Launch a script of this folder by a file of accelerate's."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--main_process_port", str(free_port()), f"tests/processes/{script}.py", *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]


def facts_of(folder: Path) -> dict:
    return json.loads((folder / "facts.json").read_text())


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("one"), "one", WHOLE, WINDOW)


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("ddp"), "ddp", WHOLE, LOCAL, WINDOW)


ZERO = [pytest.param(f"zero{stage}", marks=needs_deepspeed) for stage in (2, 3)]


@pytest.mark.parametrize("how", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow), *ZERO])
def test_two_processes_train_save_and_log_as_one(how, one, ddp, tmp_path):
    one, two = one / WHOLE, (ddp if how == "ddp" else launch(tmp_path, how, WHOLE)) / WHOLE
    facts, single = facts_of(two), facts_of(one)
    assert facts["world"] == 2 and single["world"] == 1
    assert facts["sharded"] == (how == "fsdp")
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in (two, one))
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    keys = {key for key in single["log"] if key.startswith("moe/")}
    assert {"moe/load_balancing", "moe/load_entropy", "moe/max_over_mean_load", "moe/dead_experts"} <= keys
    assert {key: facts["log"][key] for key in keys} == pytest.approx(
        {key: single["log"][key] for key in keys}, rel=1e-4
    )
    history, alone = RoutingHistory.load(two).tensors(), RoutingHistory.load(one).tensors()
    assert history.keys() == alone.keys()
    for name, rows in alone.items():
        torch.testing.assert_close(history[name], rows, rtol=1e-4, atol=1e-6)
    logits = [
        PeftModel.from_pretrained(tiny_llama(), folder).eval()(**padded_batch([5, 3])).logits for folder in (two, one)
    ]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_the_step_is_large_enough_to_tell_a_wrong_balance(one, ddp):
    folders = (ddp / LOCAL, one / WHOLE)
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert any(not torch.allclose(found[name], wanted, rtol=1e-4, atol=1e-5) for name, wanted in expected.items())


@pytest.mark.parametrize("how", ["ddp", *ZERO])
def test_accumulation_on_two_processes_equals_accumulation_on_one_with_the_same_micro_batches(how, one, ddp, tmp_path):
    two = ddp if how == "ddp" else launch(tmp_path, how, WINDOW)
    folders = (two / WINDOW, one / WINDOW)
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    for name, wanted in expected.items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


SPARSE = ["esft", "perft", "perft-e", "expert-lora"]
# The launcher starts processes, and the model has been split when it was loaded.
SPLIT = ["perft@fsdp", "perft@ep+fsdp", "perft-e@ep+fsdp", "perft@tp", "perft-e@tp+ep"]
LIKE_EXPERTS = [
    f"{name}@{way}+split" for name, way in itertools.product(["perft-e", "esft", "expert-lora"], ["tp+ep", "ep+fsdp"])
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of the runs of a launch, each started once for all methods that it is asked for."""
    folder, found = tmp_path_factory.mktemp("runs"), {}

    def of(how):
        if how not in found:
            methods = {"one": [*SPARSE, *SPLIT, *LIKE_EXPERTS], "ddp": ["esft", "perft", *SPLIT, *LIKE_EXPERTS]}
            found[how] = launch(folder, how, WHOLE, method=",".join(methods.get(how, SPARSE)))
        return found[how]

    return of


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "how"),
    [
        *itertools.product(["esft", "perft", *SPLIT, *LIKE_EXPERTS], ["ddp"]),
        *itertools.product(SPARSE, ["fsdp", "fsdp-from-one"]),
    ],
)
def test_two_processes_train_a_sparse_backbones_adapter_as_one(method, how, runs):
    two, one = runs(how) / method / WHOLE, runs("one") / method / WHOLE
    facts, single = facts_of(two), facts_of(one)
    assert facts["world"] == 2 and facts["sharded"] == (how.startswith("fsdp") or "@" in method)
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in (two, one))
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    keys = {"loss", "grad_norm", *(key for key in single["log"] if key.startswith("moe/"))}
    assert {key: facts["log"][key] for key in keys} == pytest.approx(
        {key: single["log"][key] for key in keys}, rel=1e-4
    )


@pytest.mark.slow
def test_sharded_states_are_resumed_with_their_own_settings_alone(tmp_path):
    config = tmp_path / "accelerate.yaml"
    fields = {"compute_environment": "LOCAL_MACHINE", "mixed_precision": "no", **LAUNCHES["sharded"]}
    config.write_text(yaml.safe_dump(fields))
    run_script(config, "resume_script", str(tmp_path))
    facts = facts_of(tmp_path)
    assert "pytorch_model_fsdp_0" in facts["files"] and "adapter_config.json" in facts["files"]
    assert "adapter_model.safetensors" not in facts["files"]
    assert "lora_alpha=4, but the adapter 'default' that is to be trained has lora_alpha=16" in facts["refused"]
    assert facts["refused at"] == 0 and facts["resumed to"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("how", ["one", "ddp", "fsdp", "sharded", *ZERO])
def test_a_resumed_run_ends_where_one_without_a_break_does(how, tmp_path):
    config = tmp_path / "accelerate.yaml"
    fields = {"compute_environment": "LOCAL_MACHINE", "mixed_precision": "no", **LAUNCHES[how]}
    config.write_text(yaml.safe_dump(fields))
    run_script(config, "resumed_script", str(tmp_path))
    facts = facts_of(tmp_path)
    assert facts["world"] == (1 if how == "one" else 2) and facts["steps"] == [3, 3]
    assert facts["tensors"] > 4 and facts["moved"] > 1e-3 and facts["far"] < 1e-6, facts
