"""Adapters that are split like the experts train, are saved and are loaded as those that one process holds whole."""

from __future__ import annotations

import json
import sys

import pytest

from tests.contract.cases import tiny_olmoe
from tests.processes.split_worker import CASES, EXPERTS
from tests.processes.test_parallel import tiny_gpt_oss, tiny_qwen3_moe
from tests.processes.together import run_together

pytestmark = [pytest.mark.multi_process, pytest.mark.slow]
TWO, FOUR = ("tp+ep", "ep+fsdp"), ("ep+fsdp, twice", "replicas", "tp+ep+fsdp")
MODELS = {"olmoe": tiny_olmoe, "qwen3_moe": tiny_qwen3_moe, "gpt_oss": tiny_gpt_oss}


def check(model, way, cases, folder, processes):
    model.save_pretrained(folder / "model")
    command = [sys.executable, "-m", "tests.processes.split_worker"]
    arguments = [str(processes), str(folder), way, ",".join(cases)]
    run_together([[*command, str(rank), *arguments] for rank in range(processes)], timeout=1800)
    held = dict.fromkeys(cases, 0)
    for rank in range(processes):
        found = json.loads((folder / f"split.{rank}.json").read_text())
        assert found.keys() == set(cases)
        for case, facts in found.items():
            # Selections lie unevenly: every process has as many rows as the one with the most.
            share = 2 / 3 if CASES[case].get("experts") is EXPERTS else 1 / 2
            assert 0 < facts.pop("parts") <= share * facts["all"], (case, facts)
            held[case] += facts.pop("all")
            for what, far in facts.items():
                assert far < (2e-5 if what == "gradients" else 1e-5), (way, case, what, far)
    assert all(held.values())


@pytest.mark.parametrize("way", TWO)
@pytest.mark.parametrize("model", MODELS)
def test_an_adapter_of_which_each_process_holds_a_part_equals_a_whole_one(model, way, tmp_path):
    check(MODELS[model](), way, list(CASES), tmp_path, 2)


@pytest.mark.parametrize("way", FOUR)
def test_processes_with_the_same_experts_keep_the_same_adapter(way, tmp_path):
    check(tiny_qwen3_moe(), way, ["perft-e", "esft-full", "expert-lora-some"], tmp_path, 4)
