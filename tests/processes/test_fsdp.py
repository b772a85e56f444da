"""Adapters under FSDP2's further settings train as in one process: offloading, values from one process, 16 bits."""

from __future__ import annotations

import json
import sys

import pytest

from tests.processes.fsdp_worker import SETTINGS
from tests.processes.together import run_together

pytestmark = [pytest.mark.multi_process, pytest.mark.slow]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    command = [sys.executable, "-m", "tests.processes.fsdp_worker"]
    run_together([[*command, str(rank), str(folder), "|".join(SETTINGS)] for rank in range(2)], timeout=900)
    return [json.loads((folder / f"fsdp.{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", [name for name in SETTINGS if not name.startswith("mixed") and "16 bit" not in name])
def test_a_step_is_that_of_one_process(name, found):
    for facts in found:
        assert facts[name]["names"] and facts[name]["gradients"] < 2e-5 and facts[name]["stepped"] < 1e-5, facts[name]


@pytest.mark.parametrize("name", [name for name in SETTINGS if name.startswith("mixed")])
def test_scores_stay_float32_under_mixed_precision_and_gradients_are_those_of_one_process_to_16_bits(name, found):
    for facts in found:
        assert facts[name]["scores"] == ["torch.float32"]
        # The backbone computes in bfloat16, in which some tokens take other experts.
        assert facts[name]["gradients"] < 0.2 and facts[name]["stepped"] < 0.1, facts[name]


def test_a_router_in_16_bit_beside_copies_in_float32_is_what_fsdp_refuses(found):
    for facts in found:
        assert "uniform original parameter dtype" in facts["router of esft, 16 bit"]["error"]
