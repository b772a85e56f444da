"""One process keeps its own tensors; what several do is measured in tests/processes, on whole training steps."""

from __future__ import annotations

import torch
from torch import distributed as dist

from moe_peft.forward.processes import num_processes, sum_over_processes


def own_tensors() -> list[torch.Tensor]:
    """Tensors of unequal sizes and dtypes."""
    return [
        torch.arange(3, dtype=torch.float32),
        torch.full((5,), 1.5, dtype=torch.bfloat16),
        torch.zeros(0),
        torch.tensor([2.0**60 + 2.0**10], dtype=torch.float64),
    ]


def test_one_process_keeps_its_own_tensors():
    tensors = own_tensors()
    assert num_processes() == 1
    assert all(found is own for found, own in zip(sum_over_processes(tensors), tensors, strict=True))
    assert sum_over_processes([]) == []


def test_a_group_of_one_process_is_one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        tensors = own_tensors()
        assert num_processes() == 1
        assert all(torch.equal(found, own) for found, own in zip(sum_over_processes(tensors), tensors, strict=True))
    finally:
        dist.destroy_process_group()
