"""A run resumes with the settings that its checkpoint was trained with, or is refused, whatever trainer resumes it."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from moe_peft import EsftConfig, LoraMoeConfig, RoutedConfig, attach
from tests.contract.cases import tiny_olmoe
from tests.integrations.test_callback import rows
from tests.tiny import tiny_llama

BASE = {"num_experts": 4, "top_k": 2, "r": 2}
CASES = {
    "alpha": (tiny_llama, RoutedConfig, BASE, {"lora_alpha": 32.0}, "lora_alpha"),
    "top_k": (tiny_llama, RoutedConfig, BASE, {"top_k": 1}, "top_k"),
    "normalisation": (tiny_llama, RoutedConfig, BASE, {"norm_topk_prob": True}, "norm_topk_prob"),
    "rslora": (tiny_llama, LoraMoeConfig, {"num_experts": 4, "r": 2}, {"use_rslora": True}, "use_rslora"),
    "experts": (tiny_olmoe, EsftConfig, {"experts": {"0": [1, 3]}}, {"experts": {"0": [2, 0]}}, "experts"),
}
OFTEN = {
    ("alpha", False, False), ("alpha", True, True), ("top_k", True, False), ("normalisation", False, True),
    ("rslora", False, False), ("experts", True, True),
}  # fmt: skip


def combinations():
    """Each case under each way of making and attaching a trainer; all but a few of them in the slow run."""
    for case in CASES:
        for model_init in (False, True):
            for attached in (False, True):
                ways = f"{'model_init' if model_init else 'model'}-{'attached' if attached else 'plain'}"
                marks = () if (case, model_init, attached) in OFTEN else pytest.mark.slow
                yield pytest.param(case, model_init, attached, id=f"{case}-{ways}", marks=marks)


def trainer_of(folder, make, model_init, attached, max_steps):
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=max_steps,
        per_device_train_batch_size=2,
        save_strategy="steps",
        save_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    data = Dataset.from_list([{k: v for k, v in row.items() if k != "task_type"} for row in rows(8)])
    own = {"model_init": make} if model_init else {"model": make()}
    trainer = Trainer(**own, args=args, train_dataset=data)
    return attach(trainer) if attached else trainer


@pytest.mark.parametrize(("case", "model_init", "attached"), list(combinations()))
def test_other_settings_are_refused_and_the_same_resume(case, model_init, attached, tmp_path):
    build, config, fields, changed, name = CASES[case]

    def make(**other):
        return get_peft_model(build(), config(task_type="CAUSAL_LM", **{**fields, **other}))

    trainer_of(tmp_path, make, False, True, 1).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    other = trainer_of(tmp_path, lambda: make(**changed), model_init, attached, 2)
    before = {key: tensor.clone() for key, tensor in other.model.state_dict().items()}
    with pytest.raises(ValueError, match=name):
        other.train(resume_from_checkpoint=checkpoint)
    if not model_init:
        assert all(torch.equal(tensor, before[key]) for key, tensor in other.model.state_dict().items())
    same = trainer_of(tmp_path, lambda: make(), model_init, attached, 2)
    same.train(resume_from_checkpoint=checkpoint)
    assert same.state.global_step == 2
