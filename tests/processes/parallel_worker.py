"""What each of two processes runs: adapters on models that transformers splits when it loads them.

python -m tests.processes.parallel_worker <rank> <folder> <way> <case,case,...>
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from moe_peft import EsftConfig, ExpertLoraConfig, LoraMoeConfig, MoloraConfig, MovConfig, PerftConfig, RoutedConfig
from tests.contract.cases import randomize

WAYS: dict[str, dict[str, Any]] = {
    "tp": {"tp_size": 2, "tp_plan": "auto"},
    "tp+ep": {"tp_size": 2, "tp_plan": "auto", "ep_size": 2},
    "ep+fsdp": {"fsdp_size": 2, "ep_size": 2},
}
EXPERTS = {"0": [1], "1": [0, 3]}
CASES: dict[str, dict[str, Any]] = {
    "perft-s": {"cls": PerftConfig, "variant": "S", "r": 4},
    "perft-r": {"cls": PerftConfig, "variant": "R", "r": 4, "num_experts": 4, "top_k": 2},
    "perft-e": {"cls": PerftConfig, "variant": "E", "r": 4},
    "esft-full": {"cls": EsftConfig, "experts": EXPERTS},
    "esft-lora": {"cls": EsftConfig, "experts": EXPERTS, "expert_adapter": "lora", "r": 4},
    "expert-lora": {"cls": ExpertLoraConfig, "r": 4},
    "loramoe": {"cls": LoraMoeConfig, "num_experts": 4, "r": 4, "target_modules": ["q_proj", "o_proj"]},
    "molora": {"cls": MoloraConfig, "num_experts": 3, "r": 2, "target_modules": ["q_proj", "v_proj", "o_proj"]},
    "routed": {"cls": RoutedConfig, "num_experts": 4, "top_k": 2, "r": 4, "target_modules": ["k_proj", "o_proj"]},
    "mov": {"cls": MovConfig, "num_experts": 3, "target_modules": ["k_proj", "v_proj"]},
    "mov-down": {"cls": MovConfig, "num_experts": 3, "target_modules": ["o_proj"], "feedforward_modules": []},
}


def adapted(model: nn.Module, case: str) -> nn.Module:
    """An adapter with weights that change the output, on a model that may be split."""
    settings = dict(CASES[case])
    torch.manual_seed(0)
    model = get_peft_model(model, settings.pop("cls")(**settings)).eval()
    randomize(model)
    return model


def measured(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of one batch, and the gradients of the adapter."""
    ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(2))
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    gradients = {
        name: whole(parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    return whole(out.logits), gradients


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def compared(case: str, folder: Path, way: str) -> dict[str, Any]:
    """How far one adapter is from one process with the whole model, or the message that refuses it."""
    logits, gradients = measured(adapted(AutoModelForCausalLM.from_pretrained(folder / "model"), case))
    model = AutoModelForCausalLM.from_pretrained(folder / "model", distributed_config=DistributedConfig(**WAYS[way]))
    try:
        model = adapted(model, case)
    except (TypeError, ValueError) as error:
        return {"refused": str(error)}
    split_logits, split_gradients = measured(model)
    if gradients.keys() != split_gradients.keys():
        return {"lacks": sorted(gradients.keys() ^ split_gradients.keys())}
    if way == "ep+fsdp":  # both processes have the same batch, so that the mean of their gradients is that of one
        for gradient in split_gradients.values():
            dist.all_reduce(gradient)
            gradient /= 2
    return {
        "logits": (logits - split_logits).abs().max().item() / logits.abs().max().item(),
        "gradients": max(
            (
                (gradients[name] - split_gradients[name]).abs().max() / gradients[name].abs().max().clamp(min=1e-6)
            ).item()
            for name in gradients
        ),
    }


def run(rank: int, folder: Path, way: str, cases: list[str]) -> None:
    """Compare all cases, and let the first process write what it found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    found = {}
    for case in cases:
        found[case] = compared(case, folder, way)
        gc.collect()
    (folder / f"{way}.{rank}.json").write_text(json.dumps(found, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    run(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4].split(","))
