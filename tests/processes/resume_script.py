"""Saves sharded states under FSDP2, and resumes from them with the same settings and with others.

accelerate launch tests/processes/resume_script.py <folder>
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import moe_peft
from tests.processes.sft_script import allow_fsdp_on_cpu, base_of, tokenizer


def trainer_of(folder: str, steps: int, alpha: int) -> SFTTrainer:
    args = SFTConfig(
        output_dir=folder,
        max_steps=steps,
        save_steps=1,
        per_device_train_batch_size=1,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    config = moe_peft.RoutedConfig(task_type="CAUSAL_LM", num_experts=4, r=2, lora_alpha=alpha)
    rows = Dataset.from_list([{"input_ids": [3 + i, 5, 7, 9]} for i in range(8)])
    trainer = SFTTrainer(
        model=base_of("routed", Path(folder)),
        args=args,
        train_dataset=rows,
        processing_class=tokenizer(),
        peft_config=config,
    )
    return moe_peft.attach(trainer)


def main(folder: str) -> None:
    allow_fsdp_on_cpu()
    trainer_of(folder, 1, 4).train()
    checkpoint = Path(folder) / "checkpoint-1"
    facts = {"files": sorted(path.name for path in checkpoint.iterdir())}
    other = trainer_of(folder, 2, 16)
    try:
        other.train(resume_from_checkpoint=str(checkpoint))
    except ValueError as error:
        facts["refused"], facts["refused at"] = str(error), other.state.global_step
    same = trainer_of(folder, 2, 4)
    same.train(resume_from_checkpoint=str(checkpoint))
    facts["resumed to"] = same.state.global_step
    if same.is_world_process_zero():
        (Path(folder) / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1])
