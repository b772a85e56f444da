"""A group of one process, and models whose experts are shared out over it: expert parallelism without others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import distributed as dist
from torch import nn
from transformers.distributed.expert_parallel import apply_expert_parallelism

from moe_peft.backbone.local_experts import NAME


@contextmanager
def group_of_one(folder: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def shared_out(model: nn.Module, implementation: str = NAME) -> nn.Module:
    """Share the experts of a model out over the group, as transformers does when it loads one."""
    mesh = dist.init_device_mesh("cpu", (1, 1), mesh_dim_names=("ep", "tp"))
    plan = {}
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            plan |= {f"{name}.{own}": "grouped_gemm" for own, _ in module.named_parameters(recurse=False)}
            plan[name] = "ep_dispatch_experts"
    return apply_expert_parallelism(model, mesh["ep"], mesh["tp"], plan, implementation)
