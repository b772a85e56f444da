"""The forms of data and loss of supervised fine-tuning, each through train/sft.py in full."""

from __future__ import annotations

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.train.tiny_run import (
    TEMPLATE,
    logits,
    make_base,
    make_data,
    make_tokenizer,
    reloaded,
    run_here,
    words,
    write_run,
)

TEXTS = [{"text": words(i, 3 + i % 5)} for i in range(14)]
PAIRS = [{"prompt": words(i, 3), "completion": " " + words(20 + i, 2)} for i in range(14)]
CHATS = [
    {"messages": [{"role": "user", "content": words(i, 3)}, {"role": "assistant", "content": words(20 + i, 2)}]}
    for i in range(14)
]


def batch_of(trainer) -> dict:
    return next(iter(trainer.get_train_dataloader()))


def run(tmp_path, rows, *flags, **values):
    base = make_base(tmp_path / "base", **values.pop("model", {}))
    data = make_data(tmp_path / "data", rows)
    trainer = run_here("sft", write_run(tmp_path, model_name_or_path=base, dataset_name=data, **values), *flags)
    assert len(trainer.state.log_history) >= trainer.state.max_steps
    return base, trainer


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packing_fills_rows_and_trains(strategy, tmp_path):
    base, trainer = run(tmp_path, TEXTS, packing=True, packing_strategy=strategy, max_length=16)
    batch = batch_of(trainer)
    if strategy == "bfd":
        assert batch["input_ids"].shape[0] == 1 and (batch["position_ids"] == 0).sum() > 2
    else:
        assert batch["input_ids"].shape == (2, 16)
    assert torch.equal(logits(reloaded(base, tmp_path / "out")), logits(trainer.model))


def test_padding_free_joins_the_rows_of_a_batch_and_trains(tmp_path):
    base, trainer = run(tmp_path, TEXTS, "--max_length", "none", padding_free=True)
    batch = batch_of(trainer)
    assert batch["input_ids"].shape[0] == 1 and (batch["position_ids"] == 0).sum() == 2
    assert torch.equal(logits(reloaded(base, tmp_path / "out")), logits(trainer.model))


@pytest.mark.parametrize(("rows", "values"), [(PAIRS, {}), (CHATS, {"assistant_only_loss": True})])
def test_the_loss_is_on_the_completion_or_on_the_assistant_alone(rows, values, tmp_path):
    _, trainer = run(tmp_path, rows, **values)
    batch = batch_of(trainer)
    # Two words of the answer and the end of the turn, of the five words and more of a row.
    assert ((batch["labels"] != -100).sum(-1) == 3).all() and (batch["attention_mask"].sum(-1) > 5).all()


def test_assistant_only_loss_of_data_that_is_no_conversation_is_refused(tmp_path):
    with pytest.raises(ValueError, match="assistant_only_loss"):
        run(tmp_path, TEXTS, assistant_only_loss=True)


def test_eos_token_ends_every_example_and_an_unknown_one_is_refused(tmp_path):
    _, trainer = run(tmp_path, TEXTS, eos_token="<s>")
    batch = batch_of(trainer)
    last = batch["attention_mask"].sum(-1) - 1
    assert (batch["input_ids"][torch.arange(2), last] == 1).all()
    with pytest.raises(ValueError, match="not found in the vocabulary"):
        run_here("sft", tmp_path / "run.yaml", "--eos_token", "nowhere")


@pytest.mark.parametrize("tied", [False, True], ids=["own-head", "tied-head"])
def test_new_tokens_of_a_cloned_chat_template_train_save_and_reload(tied, tmp_path):
    source = make_tokenizer(("<|user|>", "<|end|>"), TEMPLATE.replace("w5", "<|user|>"))
    source.eos_token = "<|end|>"
    source.save_pretrained(tmp_path / "source")
    new = {"chat_template_path": str(tmp_path / "source"), "moe_trainable_token_indices": [9]}
    base, trainer = run(tmp_path, CHATS, model={"tie_word_embeddings": tied}, **new)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    user, end = tokenizer.convert_tokens_to_ids(["<|user|>", "<|end|>"])
    assert (user, end) == (64, 65) and tokenizer.eos_token_id == end
    batch = batch_of(trainer)
    assert (batch["input_ids"] == user).any(-1).all() and (batch["labels"] == end).any(-1).all()
    first, last = (load_file(tmp_path / f"out/checkpoint-{step}/adapter_model.safetensors") for step in (1, 3))
    rows = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    # Token 9 and, up to the next multiple of 64, those that are new.
    assert last[rows].shape == (1 + 64, 32) and (first[rows] != last[rows])[1].any()
    assert ("base_model.model.lm_head.modules_to_save.weight" in last) == (not tied)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer))
    fresh = PeftModel.from_pretrained(model, tmp_path / "out")
    assert logits(fresh).shape[-1] == 128
    assert torch.equal(logits(fresh), logits(trainer.model))
    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(auto), logits(trainer.model))


def test_a_template_file_replaces_the_tokenizers_own(tmp_path):
    (tmp_path / "template.jinja").write_text(TEMPLATE.replace("w5 ", "w7 "))
    _, trainer = run(tmp_path, CHATS, chat_template_path=str(tmp_path / "template.jinja"))
    assert (batch_of(trainer)["input_ids"] == 7).any(-1).all()
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert "w7 " in saved.chat_template
