"""`accelerate launch train/reward.py`: a routed adapter and a score head, trained, saved and reloaded together."""

from __future__ import annotations

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from tests.train.tiny_run import (
    TEMPLATE,
    assert_trained,
    launch,
    log_entries,
    logits,
    make_base,
    make_data,
    make_tokenizer,
    reloaded,
    run_here,
    words,
    write_run,
)


@pytest.mark.slow
def test_a_launched_run_trains_the_score_head_logs_evaluates_saves_and_reloads(tmp_path):
    rows = [{"chosen": words(20 + i, 5), "rejected": words(40 + i, 4)} for i in range(10)]
    base, data = make_base(tmp_path / "base"), make_data(tmp_path / "data", rows)
    evaluation = {"eval_strategy": "steps", "eval_steps": 2}
    run = write_run(tmp_path, model_name_or_path=base, dataset_name=data, max_steps=50, **evaluation)
    flags = ("--max_steps", "3", "--moe_num_experts", "3")
    printed = launch("reward", run, *flags)
    assert "Routed experts: 3 experts of rank 2, router top_k, top 2; 6 places" in printed
    out = tmp_path / "out"
    assert_trained(out, num_tensors=3 * 6 + 1)
    assert load_file(out / "adapter_model.safetensors")["base_model.model.score.weight"].shape == (1, 32)
    assert log_entries(out / "checkpoint-3", "eval_loss")
    trainer = run_here("reward", run, *flags, "--output_dir", str(tmp_path / "here"))
    assert logits(trainer.model).shape == (2, 1)
    torch.manual_seed(11)  # The fresh base model gets another score head, which the adapter's must replace.
    fresh = reloaded(base, out, AutoModelForSequenceClassification, num_labels=1)
    assert torch.equal(logits(fresh), logits(trainer.model))
    auto = AutoPeftModelForSequenceClassification.from_pretrained(out, num_labels=1)
    assert torch.equal(logits(auto), logits(trainer.model))


def test_new_tokens_of_a_cloned_chat_template_train_save_and_reload(tmp_path):
    source = make_tokenizer(("<|user|>",), TEMPLATE.replace("w5", "<|user|>"))
    source.save_pretrained(tmp_path / "source")
    ask, say = ({"role": "user", "content": "w8 w9"}, {"role": "assistant", "content": "w10"})
    rows = [{"chosen": [ask, say], "rejected": [ask, {**say, "content": words(i, 3)}]} for i in range(8)]
    base, data = make_base(tmp_path / "base"), make_data(tmp_path / "data", rows)
    new = {"chat_template_path": str(tmp_path / "source"), "moe_trainable_token_indices": [9]}
    trainer = run_here("reward", write_run(tmp_path, model_name_or_path=base, dataset_name=data, **new))
    saved = load_file(tmp_path / "out/adapter_model.safetensors")
    assert saved["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"].shape == (1 + 64, 32)
    auto = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=1)
    auto.config.pad_token_id = 0
    assert torch.equal(logits(auto), logits(trainer.model))
