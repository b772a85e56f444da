"""Trains three steps, and again from the checkpoint of the first: both must end with the same adapter.

accelerate launch tests/processes/resumed_script.py <folder>
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

import moe_peft
from tests.processes.sft_script import allow_fsdp_on_cpu, base_of, tokenizer


def trainer_of(folder: Path) -> SFTTrainer:
    set_seed(0)
    args = SFTConfig(
        output_dir=str(folder),
        max_steps=3,
        save_steps=1,
        per_device_train_batch_size=1,
        learning_rate=0.05,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
    )
    config = moe_peft.RoutedConfig(
        task_type="CAUSAL_LM", num_experts=4, r=2, lora_dropout=0.0, router_aux_loss_coef=1.0
    )
    rows = Dataset.from_list([{"input_ids": [3 + i, 5, 7 + i, 9]} for i in range(8)])
    trainer = SFTTrainer(
        model=base_of("routed", folder),
        args=args,
        train_dataset=rows,
        processing_class=tokenizer(),
        peft_config=config,
    )
    return moe_peft.attach(trainer)


def adapter_of(trainer: SFTTrainer) -> dict[str, torch.Tensor]:
    """What is trained, whole, by name."""
    found = {}
    for name, own in trainer.model.named_parameters():
        if own.requires_grad:
            if hasattr(own, "ds_id"):
                import deepspeed

                with deepspeed.zero.GatheredParameters([own]):
                    found[name] = own.detach().float().clone()
            else:
                found[name] = (own.full_tensor() if hasattr(own, "full_tensor") else own).detach().float().clone()
    return found


def main(folder: Path) -> None:
    whole = trainer_of(folder)
    whole.train()
    expected = adapter_of(whole)
    resumed = trainer_of(folder)
    before = adapter_of(resumed)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    found = adapter_of(resumed)
    same = {name: name.replace("_fsdp_wrapped_module.", "") for name in before}
    facts = {
        "world": resumed.accelerator.num_processes,
        "steps": [whole.state.global_step, resumed.state.global_step],
        "tensors": len(expected),
        "moved": max((expected[same[name]] - own).abs().max().item() for name, own in before.items()),
        "far": max((found[name] - own).abs().max().item() for name, own in expected.items()),
    }
    if resumed.is_world_process_zero():
        (folder / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        allow_fsdp_on_cpu()
    main(Path(sys.argv[1]))
