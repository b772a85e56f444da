"""What each of several processes runs in the tests: forward and backward of its share of a batch.

python -m tests.processes.worker <rank> <world size> <folder> <wrapping>
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from torch import distributed as dist
from torch import nn

from moe_peft import (
    EsftConfig,
    LoraMoeConfig,
    MovConfig,
    PerftConfig,
    RoutedConfig,
    after_step,
    routed_layers,
    router_loss,
)
from moe_peft.quantization.four_bit import dequantize_on_read, quantize
from moe_peft.telemetry.stacked import as_sums
from tests.contract.cases import randomize, tiny_olmoe
from tests.methods.esft_models import sparse_model
from tests.processes import apart
from tests.tiny import padded_batch, tiny_llama, tiny_t5

# Rows of unequal length, so that the processes hold unequal numbers of tokens.
LENGTHS = [9, 7, 2, 3]
GROUPS = [0, 1, 1, 0]
# Experts of a backbone of 32: the first process uses expert 1 alone of these, the second process the others.
IDLE = {"0": [1, 13], "1": [15, 17]}
SHARED = {"num_experts": 4, "lora_dropout": 0.0, "router_z_loss_coef": 0.2}
CONFIGS = {
    "top_k": lambda scope: RoutedConfig(router_aux_loss_coef=1.0, load_balancing_scope=scope, **SHARED),
    "dense": lambda scope: RoutedConfig(
        router="dense", router_aux_loss_coef=1.0, load_balancing_scope=scope, **SHARED
    ),
    "groups": lambda scope: LoraMoeConfig(
        expert_groups=[0, 0, 1, 1],
        localized_balancing_delta=0.4,
        router_aux_loss_coef=1.0,
        load_balancing_scope=scope,
        **SHARED,
    ),
    "perft-r": lambda scope: PerftConfig(
        r=2, lora_dropout=0.0, router_aux_loss_coef=1.0, router_z_loss_coef=0.2, load_balancing_scope=scope
    ),
    "perft-e": lambda scope: PerftConfig(variant="E", r=2, lora_dropout=0.0),
    "esft": lambda scope: EsftConfig(experts={"0": [1, 3], "1": [2]}),
    "esft-lora": lambda scope: EsftConfig(experts={"0": [1, 3], "1": [2]}, expert_adapter="lora", r=2),
    # The first process sends no token to the copies of the last layer.
    "esft-idle": lambda scope: EsftConfig(experts=IDLE),
    "mov": lambda scope: MovConfig(num_experts=4, target_modules=["k_proj", "v_proj"]),
}
FOUR_BIT = ("perft-e-4bit", "esft-4bit") if find_spec("bitsandbytes") else ()
CONFIGS |= {kind: CONFIGS[kind.removesuffix("-4bit")] for kind in FOUR_BIT}
# Methods that are tested on a sparse backbone.
SPARSE = ("perft-r", "perft-e", "esft", "esft-lora", "esft-idle", "mov", *FOUR_BIT)
WITHOUT_LOSSES = SPARSE[1:]
# name -> (configuration, scope, checkpointing)
CASES = {
    "top_k": ("top_k", "global_batch", "off"),
    "top_k-non-reentrant": ("top_k", "global_batch", "non-reentrant"),
    "top_k-reentrant": ("top_k", "global_batch", "reentrant"),
    "dense": ("dense", "global_batch", "off"),
    "groups": ("groups", "global_batch", "off"),
    "groups-reentrant": ("groups", "global_batch", "reentrant"),
    "micro": ("top_k", "micro_batch", "off"),
    "t5": ("top_k", "global_batch", "off"),
    **{kind: (kind, "global_batch", "off") for kind in SPARSE},
    "esft-non-reentrant": ("esft", "global_batch", "non-reentrant"),
    "perft-r-reentrant": ("perft-r", "global_batch", "reentrant"),
}


def base_of(case: str) -> nn.Module:
    kind = CASES[case][0]
    if kind == "esft-idle":
        return sparse_model("olmoe", num_experts=32)
    if kind in FOUR_BIT:
        base = tiny_olmoe()
        for layer in base.model.layers:
            for name in ("gate_up_proj", "down_proj"):
                dequantize_on_read(layer.mlp.experts, name, *quantize(getattr(layer.mlp.experts, name)))
        return base
    if kind in SPARSE:
        return tiny_olmoe()
    return tiny_t5(dropout_rate=0.0) if case == "t5" else tiny_llama()


def model_of(case: str) -> nn.Module:
    kind, scope, checkpointing = CASES[case]
    model = get_peft_model(base_of(case), CONFIGS[kind](scope)).train()
    randomize(model)
    if checkpointing != "off":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    return model


def batch_of(case: str, rank: int, world: int) -> dict[str, torch.Tensor]:
    """This process's rows of the batch; all of them for a single process."""
    batch = padded_batch(LENGTHS, seed=4)
    if case == "t5":
        batch["decoder_input_ids"] = batch["input_ids"].flip(0)
        batch["decoder_attention_mask"] = batch["attention_mask"].flip(0)
    if CASES[case][0] == "groups":
        batch["task_type"] = torch.tensor(GROUPS)
    size = len(LENGTHS) // world
    return {name: value[rank * size : (rank + 1) * size] for name, value in batch.items()}


def task_loss(model: nn.Module, batch: dict[str, torch.Tensor], world: int) -> torch.Tensor:
    """A sum over valid tokens, scaled so that the mean over processes is that of a single one."""
    logits = model(**batch, use_cache=False).logits
    mask = batch.get("decoder_attention_mask", batch["attention_mask"])
    return world * (logits.square().mean(-1) * mask).sum() / sum(LENGTHS)


def measured(case: str, model: nn.Module, rank: int, world: int) -> tuple[dict[str, torch.Tensor], dict]:
    """Gradients by name, and the value of the router losses and the all-reduces that were seen."""
    calls = []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda tensor, *args, **kwargs: (
        calls.append(tensor.numel()),
        all_reduce(tensor, *args, **kwargs),
    )[1]
    try:
        batch = batch_of(case, rank, world)
        loss = task_loss(model, batch, world)
        facts = {"forward": len(calls), "router_loss": float(router_loss(model).detach())}
        loss.backward()
        facts["backward"] = len(calls) - facts["forward"]
        with torch.no_grad():
            model(**batch, use_cache=False)
        model.eval()(**batch, use_cache=False)
        facts["evaluation"] = len(calls) - facts["forward"] - facts["backward"]
    finally:
        dist.all_reduce = all_reduce
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    named = {n: p.grad for n, p in inner.named_parameters() if p.requires_grad}
    return {name: _whole(grad) for name, grad in named.items()}, facts


# Layers that each of two processes runs in a step; the first is idle in the second step.
ROUTERS = ("top_k", "capacity")
DEPTHS = ((1, 2), (0, 2), (2, 1))


def told_after_steps(router: str, ranks: Sequence[int]) -> list[dict[str, list[torch.Tensor]]]:
    """What selectors are told after each step, by place, where processes call other layers.

    Args:
        router: Name of the router.
        ranks: Whose rows this process runs.
    """
    settings = {"init_weights": False, "load_balancing_scope": "micro_batch"}
    settings |= {"capacity_factor": 1.0} if router == "capacity" else {}
    config = RoutedConfig(num_experts=4, top_k=2, r=2, router=router, **settings)
    torch.manual_seed(0)
    model, told = get_peft_model(tiny_llama(), config).train(), {}
    for layer in routed_layers(model):
        select = layer.router["default"].select
        select.counts = True
        select.after_step = lambda statistics, place=layer.place: told.setdefault(place, as_sums(statistics))
    steps = []
    for depths in DEPTHS:
        for rank in ranks:
            model.base_model.model.config.num_hidden_layers = depths[rank]
            if depths[rank]:
                model(**batch_of("top_k", rank, 2), use_cache=False)
        after_step(model)
        steps.append(dict(told))
        told.clear()
    return steps


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().clone().contiguous()


def sharded(model: nn.Module) -> nn.Module:
    """FSDP2 around every decoder layer and the whole."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    return fully_shard(model)


def run(rank: int, world: int, folder: Path, wrapping: str) -> None:
    """Measure all cases, and let the first process write what it found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=world)
    facts = {}
    for case in CASES if wrapping == "ddp" else FSDP_CASES:
        model = model_of(case)
        model = nn.parallel.DistributedDataParallel(model) if wrapping == "ddp" else sharded(model)
        gradients, facts[case] = measured(case, model, rank, world)
        if wrapping == "fsdp":
            gradients |= stepped(model)
        values = [None] * world
        dist.all_gather_object(values, facts[case])
        facts[case] = values
        if rank == 0:
            save_file(gradients, folder / f"{case}.safetensors")
    if wrapping == "ddp" and world == 2:
        torch.save({router: told_after_steps(router, [rank]) for router in ROUTERS}, folder / f"told{rank}.pt")
        apart_gradients = {name: list(apart.of_two_processes(case, rank)) for name, case in apart.CASES.items()}
        torch.save(apart_gradients, folder / f"apart{rank}.pt")
    if rank == 0:
        (folder / "facts.json").write_text(json.dumps(facts))
    # A wrapped model that outlives the group destroys it, and then waits with the interpreter's lock for a thread of
    # gloo that waits for this lock.
    del model
    gc.collect()
    dist.destroy_process_group()


FSDP_CASES = (
    *("top_k", "top_k-non-reentrant", "top_k-reentrant", "groups"),
    *(*SPARSE, "esft-non-reentrant", "perft-r-reentrant"),
)


def stepped(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter as peft would save it after a step of plain SGD, and the logits with the adapter on and off."""
    from peft import get_peft_model_state_dict

    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    saved = {f"saved.{name}": _whole(value) for name, value in get_peft_model_state_dict(model).items()}
    batch = padded_batch(LENGTHS, seed=4)
    with torch.no_grad():
        saved["logits.on"] = model(**batch, use_cache=False).logits.clone()
        with model.disable_adapter():
            saved["logits.off"] = model(**batch, use_cache=False).logits.clone()
    return saved


if __name__ == "__main__":
    run(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
