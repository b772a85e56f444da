"""What each of two processes runs: adapters on a model that DeepSpeed's ZeRO-3 has cut into parts while it was loaded.

python -m tests.processes.zero_worker <rank> <folder> <port> <case,case,...>
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from moe_peft.layers.router_norms import router_norms
from tests.processes.parallel_worker import CASES, adapted, measured

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def start(rank: int, port: str) -> None:
    """Join the group through DeepSpeed, which then believes that the processes are its own launcher's."""
    names = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
    os.environ.update(names, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, DS_ACCELERATOR="cpu")
    import deepspeed

    # Compiled for minutes at its first use, for speed alone.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed(dist_backend="gloo")


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def put(model: nn.Module, values: dict[str, nn.Parameter]) -> None:
    """Give the adapter the values of another one of the same names."""
    import deepspeed

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id")):
                if parameter.numel():
                    parameter.data.copy_(values[name].data)


def compared(case: str, folder: Path) -> dict[str, Any]:
    """How far one adapter is from one process with the whole model, or the message that refuses it."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    whole = without_dropout(adapted(AutoModelForCausalLM.from_pretrained(folder / "model"), case)).train()
    logits, gradients = measured(whole)
    keeper = HfDeepSpeedConfig(CONFIG)  # from_pretrained looks for it
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    facts: dict[str, Any] = {"parts": all(parameter.numel() == 0 for parameter in base.parameters())}
    settings = dict(CASES[case])
    try:
        model = without_dropout(get_peft_model(base, settings.pop("cls")(**settings)).train())
    except (TypeError, ValueError) as error:
        return {"refused": str(error)}
    finally:
        unset_hf_deepspeed_config()
        del keeper
    put(model, dict(whole.named_parameters()))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(trained, lr=0.0), config=CONFIG)
    lengths, expected = router_norms(engine.module), router_norms(whole)
    facts["norms"] = lengths.keys() == expected.keys() and all(lengths[n].equal(own) for n, own in expected.items())
    ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(2))
    out = engine(input_ids=ids, labels=ids)
    engine.backward(out.loss)
    found = {n: safe_get_full_grad(p) for n, p in engine.module.named_parameters() if p.requires_grad}
    facts["names"] = found.keys() == gradients.keys()
    facts["logits"] = ((out.logits - logits).abs().max() / logits.abs().max()).item()
    facts["gradients"] = max(
        ((found[n] - own).abs().max() / own.abs().max().clamp(min=1e-6)).item() for n, own in gradients.items()
    )
    return facts


def run(rank: int, folder: Path, port: str, cases: list[str]) -> None:
    """Compare all cases, and write what was found."""
    torch.set_num_threads(1)
    start(rank, port)
    facts = {case: compared(case, folder) for case in cases}
    (folder / f"zero.{rank}.json").write_text(json.dumps(facts, indent=1))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4].split(","))
