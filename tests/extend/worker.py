"""What each of two processes runs for the laws of parts: a training step of its rows of a batch, by every choice.

python -m tests.extend.worker <rank> <world size> <folder>
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn

from moe_peft import after_step, routed_layers, router_loss
from tests.processes.worker import LENGTHS, task_loss
from tests.tiny import padded_batch

from . import registered
from .cases import LEARNING, PAIRS, context_needs, make, name_of
from .combinations import Choice, placed

TASKS = torch.tensor([0, 1, 1, 0])


def choices() -> list[Choice]:
    """Pairs of parts with router losses, or with tensors that change after each step, and kinds that act inside."""
    return [*(choice for choice in PAIRS if choice in LEARNING), *placed()]


def batch_of(choice: Choice, rank: int, world: int) -> dict[str, torch.Tensor]:
    """This process's rows of the batch, of unequal numbers of tokens; all of them for a single process."""
    batch = padded_batch(LENGTHS, seed=4)
    if "groups" in context_needs(choice):
        batch["task_type"] = TASKS
    size = len(LENGTHS) // world
    return {name: value[rank * size : (rank + 1) * size] for name, value in batch.items()}


def stepped(choice: Choice, rank: int = 0, world: int = 1) -> dict[str, torch.Tensor]:
    """Gradients of a step, the value of its router losses, and what the step has changed."""
    model = make("llama", choice, train=True)
    for layer in routed_layers(model):  # draws of one process are not those of two
        layer.router["default"].perturbs_training = False
    wrapped = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    loss = task_loss(wrapped, batch_of(choice, rank, world), world)
    found = {"router_loss": router_loss(model).detach().double()}
    loss.backward()
    after_step(model)
    for layer in routed_layers(model):
        objective, router = layer.objectives["default"], layer.router["default"]
        for name, coefficient in objective.coefficients.items():
            found[f"coefficient.{layer.place}.{name}"] = torch.tensor(coefficient, dtype=torch.float64)
        for name in router.frozen:
            found[f"tensor.{layer.place}.{name}"] = router.get_parameter(name).detach().clone()
    return found | {f"grad.{n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def run(rank: int, world: int, folder: Path) -> None:
    """Step with all choices, and write what this process has found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=world)
    with registered():
        torch.save({name_of(choice): stepped(choice, rank, world) for choice in choices()}, folder / f"{rank}.pt")
    gc.collect()  # a wrapped model that outlives the group waits for it
    dist.destroy_process_group()


if __name__ == "__main__":
    run(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
