"""Checkpoints in several shards, adapters on them, and what an export must leave alone."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.contract.cases import randomize
from tests.integrations.trainers import tokenizer
from tests.tiny import padded_batch, tiny_llama, train

BATCH = padded_batch([7, 5])


def checkpoint(model, folder: Path, shard: str = "30KB") -> Path:
    """A model's folder with its tokenizer, in many shards."""
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer().save_pretrained(folder)
    return folder


def trained(base: Path, folder: Path, config) -> torch.nn.Module:
    """A saved adapter with random weights on a checkpoint, and the model that has it."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), config)
    randomize(model)
    model.eval().save_pretrained(folder)
    return model


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(**BATCH).logits


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: own for file in sorted(folder.glob("*.safetensors")) for key, own in load_file(file).items()}


def digest(folder: Path) -> dict[str, str]:
    """Every file of a folder by its content."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def trained_lora(folder: Path, seed: int = 0, **fields) -> Path:
    """A LoRA that stock peft has trained for a few steps on a batch of its own."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": "gaussian"}
    torch.manual_seed(seed)
    model = get_peft_model(tiny_llama(), LoraConfig(**{**settings, **fields}))
    train(model, padded_batch([9, 6], seed=seed), steps=3, lr=5e-2)
    model.save_pretrained(folder)
    return folder
