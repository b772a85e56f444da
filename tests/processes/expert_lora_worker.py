"""What each of several processes runs: LoRA on experts over its share of a batch, under DDP or FSDP2.

python -m tests.processes.expert_lora_worker <rank> <world size> <folder> <wrapping>
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from torch import distributed as dist
from torch import nn

from moe_peft import ExpertLoraConfig, accelerate_expert_lora
from tests.contract.cases import randomize, tiny_olmoe
from tests.expert_lora_models import stock_lora
from tests.processes.worker import LENGTHS, _whole, sharded, task_loss
from tests.tiny import padded_batch

CASES = ("accelerated", "own", "own-selected")


def model_of(case: str) -> nn.Module:
    if case == "accelerated":
        return accelerate_expert_lora(stock_lora(tiny_olmoe())).train()
    experts = {"0": [1], "1": [0, 3]} if case == "own-selected" else None
    model = get_peft_model(tiny_olmoe(), ExpertLoraConfig(r=2, experts=experts)).train()
    randomize(model)
    return model


def batch_of(rank: int, world: int) -> dict[str, torch.Tensor]:
    size = len(LENGTHS) // world
    return {name: value[rank * size : (rank + 1) * size] for name, value in padded_batch(LENGTHS, seed=4).items()}


def run(rank: int, world: int, folder: Path, wrapping: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=world)
    for case in CASES:
        model = model_of(case)
        model = nn.parallel.DistributedDataParallel(model) if wrapping == "ddp" else sharded(model)
        task_loss(model, batch_of(rank, world), world).backward()
        inner = model.module if wrapping == "ddp" else model
        gradients = {n: _whole(p.grad) for n, p in inner.named_parameters() if p.requires_grad}
        if rank == 0:
            save_file(gradients, folder / f"{case}.safetensors")
    del model, inner
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    run(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
