"""LoRA on experts in two processes, replicated and sharded, has the gradients of one process on the whole batch."""

from __future__ import annotations

import sys

import pytest
from safetensors.torch import load_file

from tests.processes import expert_lora_worker as worker
from tests.processes.test_gradients import assert_close
from tests.processes.together import run_together
from tests.processes.worker import task_loss

pytestmark = [pytest.mark.multi_process, pytest.mark.slow]


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    command = [sys.executable, "-m", "tests.processes.expert_lora_worker"]
    run_together([[*command, str(rank), "2", str(path), request.param] for rank in range(2)])
    return path


@pytest.mark.parametrize("case", worker.CASES)
def test_gradients_are_those_of_one_process(case, folder):
    model = worker.model_of(case)
    task_loss(model, worker.batch_of(0, 1), 1).backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert_close(load_file(folder / f"{case}.safetensors"), expected)
