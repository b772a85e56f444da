"""Every preset, taken by its name on the command line, trains a tiny model and comes back from its files."""

from __future__ import annotations

import json
import math

import pytest
import torch
import yaml
from safetensors.torch import load_file

from moe_peft.cli.shipped import names_of
from tests.tiny import tiny_llama, tiny_mixtral
from tests.train.tiny_run import (
    ADAPTER,
    ROOT,
    log_entries,
    logits,
    make_data,
    make_tokenizer,
    reloaded,
    run_here,
    words,
    write_run,
)

pytestmark = pytest.mark.slow
OF_EXPERTS = ("perft", "esft", "expert_lora")
NUM_ROWS = 10
WITHOUT = dict.fromkeys([*ADAPTER, "moe_report"])
# Presets that train no adapter have no adapter to load.
NAMES = sorted(name for name in names_of("methods") if name != "none")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Tiny base models, rows with a task each, and selected experts."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, base in (("llama", tiny_llama()), ("mixtral", tiny_mixtral())):
        base.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    rows = [
        {"prompt": f"{words(row, 3)} ", "completion": words(50 + row, 4), "task_type": row % 2}
        for row in range(NUM_ROWS)
    ]
    make_data(folder / "data", rows)
    selection = {"experts": {"0": [0, 1], "1": [1, 2]}, "shared_experts": False, "non_expert_modules": False}
    (folder / "expert_config.json").write_text(json.dumps(selection))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_trains_by_its_name_and_loads_again(name, inputs, tmp_path):
    values = yaml.safe_load((ROOT / f"configs/methods/{name}.yaml").read_text())
    base = "mixtral" if values["moe_method"] in OF_EXPERTS else "llama"
    files = {"model_name_or_path": str(inputs / base), "dataset_name": str(inputs / "data")}
    own = {"router_aux_loss_coef": 0.0} if base == "mixtral" else {}
    run = write_run(tmp_path, **{**WITHOUT, **files, **own, "max_steps": 2, "save_steps": 1})
    flags = ["--moe_experts", str(inputs / "expert_config.json")] if values["moe_method"] == "esft" else []
    trainer = run_here("sft", run, "--moe_preset", name, *flags)
    out = tmp_path / "out"
    steps = log_entries(out / "checkpoint-2", "loss")
    assert len(steps) == 2 and all(math.isfinite(loss) for loss in steps)
    for loss in values.get("moe_losses") or {}:
        measured = log_entries(out / "checkpoint-2", f"moe/{loss}")
        assert len(measured) == 2 and all(math.isfinite(value) for value in measured), loss
    first, last = (load_file(path / "adapter_model.safetensors") for path in (out / "checkpoint-1", out))
    assert first.keys() == last.keys() and any(not torch.equal(first[key], last[key]) for key in first)
    if "task_type" not in values.get("moe_group_column", ""):
        assert torch.equal(logits(reloaded(str(inputs / base), out)), logits(trainer.model))
