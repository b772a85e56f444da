"""`accelerate launch train/kto.py`, from a YAML file and flags to a reloaded adapter, on a tiny model."""

from __future__ import annotations

import pytest
import torch

from tests.train.tiny_run import (
    assert_trained,
    launch,
    log_entries,
    logits,
    make_base,
    make_data,
    reloaded,
    run_here,
    words,
    write_run,
)


@pytest.mark.slow
def test_a_launched_run_trains_logs_evaluates_saves_and_reloads(tmp_path):
    rows = [{"prompt": words(i, 3), "completion": f" {words(20 + i, 3)}", "label": i % 2 == 0} for i in range(10)]
    base, data = make_base(tmp_path / "base"), make_data(tmp_path / "data", rows)
    evaluation = {"eval_strategy": "steps", "eval_steps": 2}
    run = write_run(tmp_path, model_name_or_path=base, dataset_name=data, max_steps=50, **evaluation)
    flags = ("--max_steps", "3", "--moe_num_experts", "3")
    printed = launch("kto", run, *flags)
    assert "Routed experts: 3 experts of rank 2, router top_k, top 2; 6 places" in printed
    out = tmp_path / "out"
    assert_trained(out, num_tensors=3 * 6)
    assert log_entries(out / "checkpoint-3", "eval_loss")
    trainer = run_here("kto", run, *flags, "--output_dir", str(tmp_path / "here"))
    assert torch.equal(logits(reloaded(base, out)), logits(trainer.model))
