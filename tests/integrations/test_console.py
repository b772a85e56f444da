"""A person reads a table of the routing every few steps; trackers get every entry at every one."""

from __future__ import annotations

import pytest
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState

import moe_peft
from moe_peft.integrations.console import ShortLog, routing_table

from .trainers import plain

ENTRIES = {
    "moe/load_balancing": 1.25,
    "moe/load_entropy": 0.9,
    "moe/max_over_mean_load": 1.5,
    "moe/layers_0-1/load_entropy": 0.8,
    "moe/layers_2-3/load_entropy": 1.0,
    "moe/layers_2-3/drop_rate": 0.25,
}
TABLE = """routing at step 7, load_balancing 1.25
              entropy  max/mean  dropped
  all places    0.900     1.500        -
  layers 0-1    0.800         -        -
  layers 2-3    1.000         -    0.250"""


def test_a_table_has_a_line_for_all_places_and_for_each_group_of_layers():
    assert routing_table(ENTRIES, 7) == TABLE
    assert routing_table({"moe/z_loss": 2.0}, 3) == "routing at step 3, z_loss 2"


def printed_at(log, step, capsys, logs=None) -> str:
    state = TrainerState(global_step=step, is_world_process_zero=True, is_local_process_zero=True)
    log(None, state, TrainerControl(), logs={"loss": 0.5, **ENTRIES} if logs is None else logs)
    return capsys.readouterr().out


def test_a_table_is_printed_every_so_many_steps_and_the_other_entries_always(capsys):
    log = ShortLog(PrinterCallback(), 10)
    assert [TABLE.splitlines()[1] in printed_at(log, step, capsys) for step in (5, 10, 14, 15, 20, 26)] == [
        True,
        False,
        False,
        True,
        False,
        True,
    ]
    assert printed_at(log, 27, capsys) == "{'loss': '0.5'}\n"
    assert "routing at step 3" in printed_at(log, 3, capsys)  # of a new run
    assert printed_at(log, 99, capsys, {"eval_loss": 1.0}) == "{'eval_loss': '1'}\n"


def test_no_tables_are_printed_where_none_are_wanted(capsys):
    assert printed_at(ShortLog(PrinterCallback(), 0), 5, capsys) == "{'loss': '0.5'}\n"


class Tracker(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def test_trackers_get_every_entry_at_every_step(tmp_path, capsys):
    trainer = plain(tmp_path, (0.05, 0.0), 1, max_steps=3)
    trainer.add_callback(tracker := Tracker())
    moe_peft.attach(trainer, console_steps=2)
    trainer.train()
    printed = capsys.readouterr().out
    of_steps = [entries for entries in tracker.seen if "loss" in entries]
    assert len(of_steps) == 3
    assert all(
        {"moe/load_entropy", "moe/layers_0-0/load_entropy", "moe/load_balancing"} <= own.keys() for own in of_steps
    )
    assert "moe/" not in printed and [f"routing at step {n}" in printed for n in (1, 2, 3)] == [True, False, True]


def test_attaching_again_changes_the_steps_alone(tmp_path):
    trainer = plain(tmp_path, (0.05, 0.0), 1)
    for steps in (5, 7):
        moe_peft.attach(trainer, console_steps=steps)
    (log,) = [c.on_log for c in trainer.callback_handler.callbacks if isinstance(c, PrinterCallback)]
    assert isinstance(log, ShortLog) and log.steps == 7 and not isinstance(log.on_log, ShortLog)


@pytest.mark.parametrize("value", [-1, 1.5, True])
def test_a_wrong_number_of_steps_is_refused_before_anything_is_changed(value, tmp_path):
    trainer = plain(tmp_path, (0.05, 0.0), 1)
    with pytest.raises(ValueError, match="console_steps"):
        moe_peft.attach(trainer, console_steps=value)
    assert not any(isinstance(c.on_log, ShortLog) for c in trainer.callback_handler.callbacks)
