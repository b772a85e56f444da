"""Trainers of a model with 4-bit experts, which cast what they train to 16 bit."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from moe_peft import EsftConfig, MoeBitsAndBytesConfig, PerftConfig, attach
from tests.backbones.models import tiny_model
from tests.integrations.trainers import tokenizer

pytestmark = pytest.mark.bnb
pytest.importorskip("bitsandbytes")


def trainer_of(config, folder):
    tiny_model("olmoe", vocab_size=64).save_pretrained(folder / "base")
    args = SFTConfig(
        output_dir=str(folder),
        model_init_kwargs={"quantization_config": MoeBitsAndBytesConfig(), "dtype": torch.bfloat16},
        max_steps=3,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        save_strategy="steps",
        save_steps=2,
        report_to=[],
        use_cpu=True,
        bf16=True,
        disable_tqdm=True,
    )
    rows = Dataset.from_list([{"input_ids": [3 + (row + i) % 60 for i in range(60)]} for row in range(24)])
    config.task_type = "CAUSAL_LM"
    trainer = SFTTrainer(
        str(folder / "base"), args, train_dataset=rows, processing_class=tokenizer(), peft_config=config
    )
    return attach(trainer)


def test_copies_of_four_bit_experts_take_the_small_steps_that_their_paper_trains_with(tmp_path):
    trainer = trainer_of(EsftConfig(experts={"0": [0, 1, 2, 3, 4, 5]}), tmp_path)
    copies = [p for p in trainer.model.parameters() if p.requires_grad]
    before = [p.detach().float().clone() for p in copies]
    trainer.train()
    moved = torch.cat([(p.float() != old).flatten() for p, old in zip(copies, before, strict=True)])
    assert moved.float().mean() > 0.9
    again = trainer_of(EsftConfig(experts={"0": [0, 1, 2, 3, 4, 5]}), tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    resumed = [p for p in again.model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 and torch.equal(p, q) for p, q in zip(copies, resumed, strict=True))


def test_low_rank_experts_beside_four_bit_ones_stay_in_the_dtype_of_the_trainer(tmp_path):
    trainer = trainer_of(PerftConfig(variant="E", r=2), tmp_path)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.bfloat16}
