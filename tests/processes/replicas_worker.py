"""What each of two processes runs: adapters that come to a model after it was split, in loops without a trainer.

python -m tests.processes.replicas_worker <rank> <folder>
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from pathlib import Path

import torch
from peft import get_peft_model
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from moe_peft import MoePeftWarning, RoutedConfig, synchronize_adapters
from tests.tiny import tiny_llama


def sharded(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def split_tensors(model: nn.Module) -> nn.Module:
    """With a distributed tensor, as tensor parallelism leaves it, in a module that no forward reads."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model.split = nn.Linear(4, 4, bias=False).requires_grad_(False)
    model.split.weight = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]), requires_grad=False)
    return model


def adapted(model: nn.Module, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    own = RoutedConfig(
        num_experts=3,
        top_k=2,
        r=2,
        lora_dropout=0.0,
        init_weights=False,
        target_modules=["q_proj"],
        router_aux_loss_coef=0.0,
    )
    return get_peft_model(model, own).train()


def batch(rank: int) -> torch.Tensor:
    return torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(rank))


def step(model: nn.Module, ids: torch.Tensor) -> list[str]:
    """One forward and backward; what it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return [str(one.message) for one in caught if issubclass(one.category, MoePeftWarning)]


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: own for name, own in model.named_parameters() if own.requires_grad}


def run(rank: int, folder: Path) -> None:
    """Write what each way of training warns of, and how far gradients are from those of one process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    base, facts = tiny_llama().requires_grad_(False), {}

    alone = adapted(sharded(copy.deepcopy(base)), seed=rank)
    facts["alone"] = step(alone, batch(rank)), step(alone, batch(rank))
    facts["evaluated"] = step(adapted(sharded(copy.deepcopy(base)), seed=rank).eval(), batch(rank))
    facts["adapter first"] = step(sharded_whole(adapted(copy.deepcopy(base), seed=0)), batch(rank))

    together = adapted(sharded(copy.deepcopy(base)), seed=rank)
    synchronize_adapters(together)
    facts["together"] = step(together, batch(rank)) + step(together, batch(rank))
    whole = adapted(copy.deepcopy(base), seed=0)
    for own in (0, 1, 0, 1):
        whole(input_ids=batch(own), labels=batch(own), use_cache=False).loss.backward()
    expected, found = trained(whole), trained(together)
    facts["names"] = sorted(found) == sorted(expected)
    facts["values"] = max((found[name] - own).abs().max().item() for name, own in expected.items())
    facts["gradients"] = max(
        ((found[name].grad - own.grad / 2).abs().max() / own.grad.abs().max()).item() for name, own in expected.items()
    )

    facts["same batch, other values"] = step(adapted(split_tensors(copy.deepcopy(base)), seed=rank), batch(0))
    facts["same batch, same values"] = step(adapted(split_tensors(copy.deepcopy(base)), seed=0), batch(0))
    (folder / f"{rank}.json").write_text(json.dumps(facts))
    dist.barrier()
    dist.destroy_process_group()


def sharded_whole(model: nn.Module) -> nn.Module:
    """FSDP2 around a model that has its adapter."""
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    return fully_shard(model)


if __name__ == "__main__":
    run(int(sys.argv[1]), Path(sys.argv[2]))
