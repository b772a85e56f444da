"""The routing history of a run: one row per logging step, saved with checkpoints, continued by a resumed run."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from moe_peft.integrations import attach
from moe_peft.layers.router_norms import router_norms
from moe_peft.telemetry.history import RoutingHistory
from moe_peft.tools.report.curves import read_curves
from tests.integrations.test_callback import adapted, rows


def trained(folder, *, resume=None, **settings):
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=2,
        logging_steps=2,
        save_steps=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    data = Dataset.from_list([{k: v for k, v in row.items() if k != "task_type"} for row in rows(8)])
    trainer = attach(Trainer(model=adapted(), args=args, train_dataset=data), **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_every_logging_step_has_a_row_of_shares(tmp_path):
    trainer = trained(tmp_path)
    history = RoutingHistory.load(tmp_path)
    assert history.steps == [2, 4, 6]
    tensors = history.tensors()
    places = {name.removeprefix("load/") for name in tensors if name.startswith("load/")}
    assert len(places) == 6 and all(place.endswith("/default") for place in places)
    for place in places:
        for kind in ("load", "importance"):
            assert tensors[f"{kind}/{place}"].shape == (3, 4)
            torch.testing.assert_close(tensors[f"{kind}/{place}"].sum(1), torch.ones(3))
    assert history.initial_norms.keys() == places
    changed = {
        place: own - history.initial_norms[f"{place}/default"] for place, own in router_norms(trainer.model).items()
    }
    assert all(own.shape == (4,) and own.any() for own in changed.values())
    logged = [entry["moe/max_over_mean_load"] for entry in trainer.state.log_history if "loss" in entry]
    loads = torch.stack([tensors[f"load/{place}"] for place in places])
    assert logged == pytest.approx((loads.amax(-1) * 4).mean(0).tolist(), rel=1e-5)


def test_a_checkpoint_holds_the_history_up_to_it_and_a_resumed_run_continues_it(tmp_path):
    trained(tmp_path / "whole")
    early = RoutingHistory.load(tmp_path / "whole" / "checkpoint-4")
    assert early.steps == [2, 4]
    trained(tmp_path / "whole", resume=str(tmp_path / "whole" / "checkpoint-4"))
    continued, first = RoutingHistory.load(tmp_path / "whole").tensors(), early.tensors()
    assert continued["step"].tolist() == [2, 4, 6]
    for name, rows_so_far in first.items():
        whole = continued[name] if name.startswith("router_norm/") else continued[name][:2]
        assert torch.equal(whole, rows_so_far)


def test_without_telemetry_the_lengths_before_training_are_kept_alone(tmp_path):
    trainer = trained(tmp_path, telemetry_steps=0)
    for folder in (tmp_path, tmp_path / "checkpoint-4"):
        history = RoutingHistory.load(folder)
        assert history.steps == [] and not history.rows and not history.is_empty
    assert {place.removesuffix("/default") for place in history.initial_norms} == set(router_norms(trainer.model))
    assert read_curves(tmp_path) is None
    trained(tmp_path, telemetry_steps=0, resume=str(tmp_path / "checkpoint-4"))
    again = RoutingHistory.load(tmp_path).initial_norms
    assert all(torch.equal(again[place], own) for place, own in history.initial_norms.items())


def test_nothing_is_saved_where_there_is_nothing(tmp_path):
    assert RoutingHistory().is_empty
    with pytest.raises(FileNotFoundError, match=r"has no routing_history\.safetensors"):
        RoutingHistory.load(tmp_path)


def test_a_place_that_was_not_measured_at_a_step_is_nan_there(tmp_path):
    history = RoutingHistory()
    history.steps = [1, 2]
    history.rows = {"load/a/default": {1: torch.tensor([0.5, 0.5])}, "load/b/default": {2: torch.tensor([1.0, 0.0])}}
    history.save(tmp_path)
    loaded = RoutingHistory.load(tmp_path)
    assert loaded.steps == [1, 2]
    assert loaded.rows.keys() == history.rows.keys()
    assert all(loaded.rows[name].keys() == own.keys() for name, own in history.rows.items())
    assert loaded.tensors()["load/a/default"][1].isnan().all()
