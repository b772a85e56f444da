"""`train/rloo.py` generates, trains, logs and saves an adapter that loads again."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.train.tiny_run import log_entries, logits, make_base, make_data, reloaded, run_here, words, write_run


@pytest.mark.slow
def test_a_run_generates_trains_logs_saves_and_reloads(tmp_path):
    data = make_data(tmp_path / "data", [{"prompt": words(i, 3)} for i in range(10)])
    base = make_base(tmp_path / "base")
    sizes = {"num_generations": 2, "max_completion_length": 6, "temperature": 1.0}
    rewards = {"reward_funcs": ["get_soft_overlong_punishment"], "max_steps": 2}
    run = write_run(tmp_path, model_name_or_path=base, dataset_name=data, **sizes, **rewards)
    trainer = run_here("rloo", run)
    out = tmp_path / "out"
    assert torch.equal(logits(reloaded(base, out)), logits(trainer.model))
    assert len(log_entries(out / "checkpoint-2", "reward")) == 2
    assert len(log_entries(out / "checkpoint-2", "moe/load_balancing")) == 2
    routers = [tensor for key, tensor in load_file(out / "adapter_model.safetensors").items() if "router" in key]
    first = [v for k, v in load_file(out / "checkpoint-1/adapter_model.safetensors").items() if "router" in k]
    assert any(not torch.equal(one, other) for one, other in zip(first, routers, strict=True))
