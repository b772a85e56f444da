"""TensorBoard has every entry of the routing, at the step and with the value of the trainer's own log."""

from __future__ import annotations

import pytest

from moe_peft import attach
from tests.integrations.test_attach import STATISTICS, plain_trainer


def test_tensorboard_has_the_entries_of_the_routing(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = attach(plain_trainer(tmp_path, None, None, report_to=["tensorboard"]))
    trainer.train()
    board = accumulator.EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    routing = {tag.removeprefix("train/moe/") for tag in board.Tags()["scalars"] if tag.startswith("train/moe/")}
    assert routing >= STATISTICS
    for name in routing:
        events = {event.step: event.value for event in board.Scalars(f"train/moe/{name}")}
        own = {entry["step"]: entry[f"moe/{name}"] for entry in trainer.state.log_history if f"moe/{name}" in entry}
        assert own and events == pytest.approx(own, rel=1e-6)
