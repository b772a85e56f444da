"""What each of two processes runs: adapters under FSDP2 with its further settings, against one process.

python -m tests.processes.fsdp_worker <rank> <folder> <setting,setting,...>
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from moe_peft import EsftConfig, ExpertLoraConfig, MoloraConfig, PerftConfig, RoutedConfig, telemetry
from tests.contract.cases import randomize, tiny_olmoe

LR = 5.0
WITHOUT_DROPOUT = {"lora_dropout": 0.0, "r": 2}
COPIES = [{"experts": {"0": [1], "1": [2]}}, {"experts": {"0": [3], "1": [0]}}]


def perft_r() -> PerftConfig:
    return PerftConfig(router_aux_loss_coef=1.0, **WITHOUT_DROPOUT)


@dataclass(frozen=True)
class Setting:
    """Adapters that are active together, and how FSDP2 splits their model.

    Attributes:
        configs: Makes the adapters' configurations.
        options: Of `fully_shard`.
        on_meta: Whether the second process begins without values, which the first one sends it.
        dtype: Of the base model.
        upcast: Whether all that is trained is float32, as accelerate makes it with mixed precision.
    """

    configs: Callable[[], list]
    options: Mapping[str, Any] = field(default_factory=dict)
    on_meta: bool = False
    dtype: torch.dtype = torch.float32
    upcast: bool = False


OFFLOADED = {"offload_policy": CPUOffloadPolicy(pin_memory=False)}
MIXED = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}
EACH: dict[str, Callable[[], list]] = {
    "perft-r": lambda: [perft_r()],
    "perft-e": lambda: [PerftConfig(variant="E", **WITHOUT_DROPOUT)],
    "esft": lambda: [EsftConfig(**COPIES[0])],
    "expert-lora": lambda: [ExpertLoraConfig(r=2)],
    "molora": lambda: [MoloraConfig(num_experts=3, target_modules=["q_proj"], **WITHOUT_DROPOUT)],
}
SETTINGS: dict[str, Setting] = {
    **{f"offload {name}": Setting(own, OFFLOADED) for name, own in EACH.items()},
    **{f"from one {name}": Setting(own, on_meta=True) for name, own in EACH.items()},
    **{f"mixed {name}": Setting(own, MIXED) for name, own in EACH.items()},
    "mixed routed": Setting(
        lambda: [RoutedConfig(num_experts=4, router_aux_loss_coef=1.0, target_modules=["q_proj"], **WITHOUT_DROPOUT)],
        MIXED,
    ),
    "two perft-r": Setting(lambda: [perft_r(), perft_r()]),
    "two perft-e": Setting(lambda: [PerftConfig(variant="E", **WITHOUT_DROPOUT) for _ in range(2)]),
    "two esft": Setting(lambda: [EsftConfig(**own) for own in COPIES]),
    "two expert-lora": Setting(lambda: [ExpertLoraConfig(r=2) for _ in range(2)]),
    "router of esft": Setting(lambda: [EsftConfig(train_router=True, **COPIES[0])]),
    "router of esft, 16 bit": Setting(lambda: [EsftConfig(train_router=True, **COPIES[0])], dtype=torch.bfloat16),
    "mixed router of esft, 16 bit": Setting(
        lambda: [EsftConfig(train_router=True, **COPIES[0])], MIXED, dtype=torch.bfloat16, upcast=True
    ),
}


def adapted(setting: Setting) -> nn.Module:
    torch.manual_seed(0)
    base, (first, *others) = tiny_olmoe().to(setting.dtype), setting.configs()
    model = get_peft_model(base, first)
    for place, config in enumerate(others):
        model.add_adapter(f"other{place}", config)
    model.base_model.set_adapter(list(model.peft_config))
    randomize(model)
    for parameter in model.parameters():
        if setting.upcast and parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model.train()


def sharded(model: nn.Module, setting: Setting) -> nn.Module:
    values = {name: own.detach().clone() for name, own in model.state_dict().items()}
    if setting.on_meta and dist.get_rank() > 0:
        model = model.to("meta")
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, **setting.options)
    model = fully_shard(model, **setting.options)
    if setting.on_meta:
        if dist.get_rank() > 0:
            model.to_empty(device="cpu")
            values = {}
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
        buffers = {name: own.clone() for name, own in tiny_olmoe().named_buffers()}
        set_model_state_dict(model, values, options=options)
        for name, own in model.get_base_model().named_buffers():
            own.data.copy_(buffers[name])
    return model


def rows(rank: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(rank))
    return {"input_ids": ids}


def trained(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The gradients of a batch, whole, and the logits after a step of plain SGD."""
    optimizer = torch.optim.SGD([own for own in model.parameters() if own.requires_grad], lr=LR)
    model(**batch, use_cache=False).logits.float().square().mean().backward()
    gradients = {name: whole(own.grad) for name, own in model.named_parameters() if own.requires_grad}
    optimizer.step()
    with torch.no_grad():
        return gradients, model(**rows(0), use_cache=False).logits.float()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().float().clone()


def far(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp(min=1e-12)).item()


def compared(name: str, rank: int) -> dict[str, Any]:
    """How far gradients and the logits after a step are from those of one process, and the dtypes of scores."""
    setting = SETTINGS[name]
    both = {key: torch.cat([rows(0)[key], rows(1)[key]]) for key in rows(0)}
    alone = adapted(setting)
    expected, logits = trained(alone.float() if setting.dtype != torch.float32 else alone, both)
    model = sharded(adapted(setting), setting)
    with torch.no_grad(), telemetry.record(model) as routings:
        model(**rows(rank), use_cache=False)
    dtypes = {str(own.logits.dtype) for place in routings.values() for own in place if own.logits is not None}
    found, stepped = trained(model, rows(rank))
    return {
        "names": sorted(found) == sorted(expected),
        "gradients": max(far(found[name], own) for name, own in expected.items()),
        "stepped": far(stepped, logits),
        "scores": sorted(dtypes),
    }


def run(rank: int, folder: Path, names: list[str]) -> None:
    """Compare all settings, and write what was found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    facts = {}
    for name in names:
        try:
            facts[name] = compared(name, rank)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            facts[name] = {"error": f"{type(error).__name__}: {error}"}
        gc.collect()
    (folder / f"fsdp.{rank}.json").write_text(json.dumps(facts, indent=1))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split("|"))
