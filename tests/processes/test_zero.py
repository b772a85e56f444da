"""Adapters on models that ZeRO-3 has cut into parts while they were loaded equal those on whole ones."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec

import pytest

from tests.processes.parallel_worker import CASES
from tests.processes.test_parallel import tiny_qwen3_moe
from tests.processes.test_trainers import free_port
from tests.processes.together import run_together

pytestmark = [
    pytest.mark.multi_process,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]


def test_an_adapter_of_a_partitioned_model_equals_that_of_a_whole_one(tmp_path):
    tiny_qwen3_moe().save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "tests.processes.zero_worker"]
    port = str(free_port())
    run_together([[*command, str(rank), str(tmp_path), port, ",".join(CASES)] for rank in range(2)], timeout=900)
    for rank in range(2):
        found = json.loads((tmp_path / f"zero.{rank}.json").read_text())
        assert found.keys() == set(CASES)
        for case, facts in found.items():
            assert facts["parts"] and facts["names"] and facts["norms"], (case, facts)
            assert facts["logits"] < 1e-5 and facts["gradients"] < 2e-5, (case, facts)
