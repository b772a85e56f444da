"""What each of several processes runs: adapters that are split like the experts, trained, saved and loaded.

python -m tests.processes.split_worker <rank> <processes> <folder> <way> <case,case,...>
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from moe_peft import EsftConfig, ExpertLoraConfig, PerftConfig, synchronize_adapters
from moe_peft.config.config import MoeConfig
from moe_peft.tuner.saving import prefix_of
from moe_peft.tuner.tensors import OwnTensor, named_tensors
from tests.contract.cases import randomize

LIKE_EXPERTS = {"ep_implementation": "moe_peft"}
WAYS: dict[str, dict[str, Any]] = {
    "tp+ep": {"tp_size": 2, "tp_plan": "auto", "ep_size": 2, **LIKE_EXPERTS},
    "ep+fsdp": {"fsdp_size": 2, "ep_size": 2, **LIKE_EXPERTS},
    # Four processes: two groups hold the same experts, whose matrices FSDP splits between them.
    "ep+fsdp, twice": {"fsdp_size": 4, "ep_size": 2, **LIKE_EXPERTS},
    "replicas": {"dp_replicate_size": 2, "fsdp_size": 2, "ep_size": 2, **LIKE_EXPERTS},
    "tp+ep+fsdp": {"tp_size": 2, "fsdp_size": 2, "ep_size": 4, **LIKE_EXPERTS},
}
# The second process of two holds no selected expert of the first layer.
EXPERTS = {"0": [1], "1": [0, 3]}
CASES: dict[str, dict[str, Any]] = {
    "perft-e": {"cls": PerftConfig, "variant": "E", "r": 4},
    "perft-e-bottleneck": {"cls": PerftConfig, "variant": "E", "r": 4, "experts": "bottleneck"},
    "esft-full": {"cls": EsftConfig, "experts": EXPERTS},
    "esft-lora": {"cls": EsftConfig, "experts": EXPERTS, "expert_adapter": "lora", "r": 4},
    "expert-lora": {"cls": ExpertLoraConfig, "r": 4},
    "expert-lora-some": {"cls": ExpertLoraConfig, "r": 4, "experts": EXPERTS, "target_modules": ["q_proj"]},
}
LEARNING_RATE = 0.05


def config_of(case: str) -> MoeConfig:
    settings = dict(CASES[case])
    if settings["cls"] is PerftConfig:
        settings["lora_dropout"] = 0.0
    return settings.pop("cls")(**settings)


def batch() -> torch.Tensor:
    return torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(2))


def whole(tensor: torch.Tensor, own: OwnTensor | None = None) -> torch.Tensor:
    """A tensor as one process has it."""
    if own is not None and own.split is not None:
        return own.split.whole(tensor).detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return whole(model(input_ids=batch()).logits)


def step(model: PeftModel) -> dict[str, torch.Tensor]:
    """One optimizer step; gradients by name, as one process has them."""
    tensors = named_tensors(model, prefix_of(model.peft_config["default"]), "default")
    groups = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    optimizer = torch.optim.AdamW([{"params": own} for own in groups.values()], lr=LEARNING_RATE, eps=1e-2)
    model(input_ids=batch(), labels=batch(), use_cache=False).loss.backward()
    trained = {name: own for name, own in model.named_parameters() if own.requires_grad}
    gradients = {name: whole(own.grad, tensors[name]).clone() for name, own in trained.items()}
    optimizer.step()
    return gradients


def furthest(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """The largest difference in shares of a tensor's largest value."""
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    return max(
        ((found[name] - own).abs().max() / own.abs().max().clamp(min=1e-6)).item() for name, own in expected.items()
    )


def split_model(folder: Path, way: str) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder / "model", distributed_config=DistributedConfig(**WAYS[way]))


def compared(case: str, folder: Path, way: str) -> dict[str, float]:
    """How far a split adapter is from a whole one, before and after an optimizer step, and in its file."""
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    alone = logits_of(base.eval())
    torch.manual_seed(0)
    model = get_peft_model(base, config_of(case)).eval()
    randomize(model)
    saved, trained = folder / f"{case} {way}", folder / f"{case} {way} trained"
    if dist.get_rank() == 0:
        model.save_pretrained(saved)
    dist.barrier()
    before, gradients = logits_of(model), step(model)
    after = logits_of(model)

    facts = {}
    split = split_model(folder, way)
    if way == "tp+ep":
        split = PeftModel.from_pretrained(split, saved, is_trainable=True).eval()
    else:  # into a name that is taken
        split = get_peft_model(split, config_of(case)).eval()
        facts["fresh"] = furthest({"": logits_of(split)}, {"": alone})
        split.load_adapter(saved, "default", is_trainable=True)
    synchronize_adapters(split)
    prefix = prefix_of(split.peft_config["default"])
    parts = [own.to_local() for name, own in split.named_parameters() if prefix in name and isinstance(own, DTensor)]
    facts["parts"] = sum(own.numel() for own in parts)
    facts["all"] = sum(own.numel() for name, own in model.named_parameters() if prefix in name and "experts" in name)
    facts["before"] = furthest({"": logits_of(split)}, {"": before})
    facts["gradients"] = furthest(step(split), gradients)
    facts["after"] = furthest({"": logits_of(split)}, {"": after})
    split.save_pretrained(trained, is_main_process=dist.get_rank() == 0)
    dist.barrier()
    model.save_pretrained(folder / f"{case} {way} {dist.get_rank()}")
    expected = load_file(folder / f"{case} {way} {dist.get_rank()}" / "adapter_model.safetensors")
    facts["file"] = furthest(load_file(trained / "adapter_model.safetensors"), expected)
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), trained).eval()
    facts["reloaded"] = furthest({"": logits_of(reloaded)}, {"": after})
    return facts


def run(rank: int, processes: int, folder: Path, way: str, cases: list[str]) -> None:
    """Compare all cases, and write what was found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=processes)
    found = {}
    for case in cases:
        found[case] = compared(case, folder, way)
        gc.collect()
    (folder / f"split.{rank}.json").write_text(json.dumps(found, indent=1))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5].split(","))
