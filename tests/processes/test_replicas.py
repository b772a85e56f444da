"""In a loop without a trainer, an adapter that comes to a split model is one on all processes, or is warned of."""

from __future__ import annotations

import json
import sys

import pytest

from tests.processes.together import run_together

pytestmark = pytest.mark.multi_process
CALL = "Call moe_peft.synchronize_adapters(model) once before training"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicas")
    command = [sys.executable, "-m", "tests.processes.replicas_worker"]
    run_together([[*command, str(rank), str(folder)] for rank in range(2)])
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_copies_that_would_drift_apart_are_warned_of_once_with_the_call_that_joins_them(found):
    for facts in found:
        first, second = facts["alone"]
        assert len(first) == 1 and CALL in first[0] and "'default'" in first[0] and not second


def test_what_needs_no_joining_is_not_warned_of(found):
    quiet = ("evaluated", "adapter first", "together", "same batch, same values")
    assert all(facts[way] == [] for facts in found for way in quiet)


def test_joined_copies_train_as_one_process_with_all_batches(found):
    for facts in found:
        assert facts["names"] and facts["values"] == 0 and facts["gradients"] < 2e-6


def test_values_that_differ_between_processes_of_one_batch_are_warned_of(found):
    for facts in found:
        (message,) = facts["same batch, other values"]
        assert CALL in message and "different values" in message
