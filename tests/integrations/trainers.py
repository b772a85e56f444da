"""A tiny run of every trainer: plain Trainer and TRL's, each with the data it takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from moe_peft import RoutedConfig
from tests.tiny import tiny_llama

NUM_ROWS = 8


def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 64)}}
    model = Tokenizer(models.WordLevel(vocab, unk_token="w3"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def words(row: int, count: int, salt: int = 0) -> str:
    """Words that differ from row to row, of unequal number."""
    return " ".join(f"w{3 + (7 * row + 5 * i + 11 * salt) % 60}" for i in range(count))


def token_rows() -> Dataset:
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(3, 60, (4 + row % 4,), generator=generator).tolist() for row in range(NUM_ROWS)]
    return Dataset.from_list([{"input_ids": row} for row in rows])


def preferences(prompt: bool = True) -> Dataset:
    rows = []
    for row in range(NUM_ROWS):
        pair = {"chosen": words(row, 3 + row % 3, 1), "rejected": words(row, 2 + row % 4, 2)}
        if prompt:
            pair = {"prompt": words(row, 3), **{name: f" {text}" for name, text in pair.items()}}
        rows.append(pair)
    return Dataset.from_list(rows)


def unpaired() -> Dataset:
    rows = [
        {"prompt": words(row, 3), "completion": f" {words(row, 2 + row % 3, 1)}", "label": row % 2 == 0}
        for row in range(NUM_ROWS)
    ]
    return Dataset.from_list(rows)


def prompts() -> Dataset:
    return Dataset.from_list([{"prompt": words(row, 3 + row % 2)} for row in range(NUM_ROWS)])


def count_of_a_word(completions: list[str], **columns: Any) -> list[float]:
    """A reward that differs between completions."""
    return [float(sum(len(word) + ord(word[-1]) for word in text.split()) % 7) for text in completions]


def collate(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    width = max(len(example["input_ids"]) for example in examples)
    ids = torch.tensor([e["input_ids"] + [0] * (width - len(e["input_ids"])) for e in examples])
    mask = torch.tensor([[1] * len(e["input_ids"]) + [0] * (width - len(e["input_ids"])) for e in examples])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def config_of(coef: float, z_coef: float, task_type: str = "CAUSAL_LM") -> RoutedConfig:
    return RoutedConfig(
        task_type=task_type,
        num_experts=4,
        top_k=2,
        init_weights=False,
        router_aux_loss_coef=coef,
        router_z_loss_coef=z_coef,
    )


def shared(folder: Path, accumulation: int, **fields: Any) -> dict[str, Any]:
    """Settings of one epoch whose last accumulation window is shorter where 4 is no multiple of its length."""
    return {
        "output_dir": str(folder),
        "num_train_epochs": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 3,
        **fields,
    }


def plain(folder: Path, coefs: tuple[float, float], accumulation: int, **fields: Any) -> Trainer:
    model = get_peft_model(tiny_llama(), config_of(*coefs))
    if fields.get("gradient_checkpointing"):
        model.enable_input_require_grads()
    args = TrainingArguments(**shared(folder, accumulation, **fields))
    return Trainer(model=model, args=args, train_dataset=token_rows(), data_collator=collate)


def _trl(trainer_cls: type, config_cls: type, data: Callable[[], Dataset], extra: dict[str, Any]) -> Callable:
    def build(folder: Path, coefs: tuple[float, float], accumulation: int, **fields: Any) -> Any:
        args = config_cls(**shared(folder, accumulation, **extra, **fields))
        return trainer_cls(
            model=tiny_llama(),
            args=args,
            train_dataset=data(),
            processing_class=tokenizer(),
            peft_config=config_of(*coefs),
        )

    return build


def _online(trainer_cls: type, config_cls: type) -> Callable:
    def build(folder: Path, coefs: tuple[float, float], accumulation: int, **fields: Any) -> Any:
        extra = {"num_generations": 2, "max_completion_length": 4, "beta": 0.04}
        args = config_cls(**shared(folder, accumulation, **extra, **fields))
        return trainer_cls(
            model=tiny_llama(),
            args=args,
            reward_funcs=count_of_a_word,
            train_dataset=prompts(),
            processing_class=tokenizer(),
            peft_config=config_of(*coefs),
        )

    return build


def reward(folder: Path, coefs: tuple[float, float], accumulation: int, **fields: Any) -> RewardTrainer:
    set_seed(0)
    config = tiny_llama().config
    config.num_labels = 1
    return RewardTrainer(
        model=LlamaForSequenceClassification(config),
        args=RewardConfig(**shared(folder, accumulation, **fields)),
        train_dataset=preferences(prompt=False),
        processing_class=tokenizer(),
        peft_config=config_of(*coefs, task_type="SEQ_CLS"),
    )


TRAINERS: dict[str, Callable] = {
    "plain": plain,
    "sft": _trl(SFTTrainer, SFTConfig, token_rows, {}),
    "dpo": _trl(DPOTrainer, DPOConfig, preferences, {}),
    "kto": _trl(KTOTrainer, KTOConfig, unpaired, {}),
    "reward": reward,
    "grpo": _online(GRPOTrainer, GRPOConfig),
    "rloo": _online(RLOOTrainer, RLOOConfig),
    "orpo": _trl(ORPOTrainer, ORPOConfig, preferences, {"max_length": 32}),
    "cpo": _trl(CPOTrainer, CPOConfig, preferences, {"max_length": 32}),
}
