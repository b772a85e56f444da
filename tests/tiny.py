"""Tiny random models of the architectures that the tests adapt, and batches for them."""

from __future__ import annotations

import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers import set_seed as seed_everything

from moe_peft.layers import RoutedLayer

VOCAB = 64
HIDDEN = 32
FFN = 48
LAYERS = 2
# Sizes of decoders of Llama's family.
DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_llama(seed: int = 0, pad_token_id: int = 0, **overrides) -> LlamaForCausalLM:
    seed_everything(seed)
    return LlamaForCausalLM(LlamaConfig(**{**DECODER, "pad_token_id": pad_token_id, **overrides}))


def tiny_mixtral(seed: int = 0, pad_token_id: int = 0, **overrides) -> MixtralForCausalLM:
    seed_everything(seed)
    fields = {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": pad_token_id}
    return MixtralForCausalLM(MixtralConfig(**{**fields, **overrides}))


def tiny_gpt2(seed: int = 0, pad_token_id: int = 0, **overrides) -> GPT2LMHeadModel:
    seed_everything(seed)
    fields = {
        "vocab_size": VOCAB,
        "n_embd": HIDDEN,
        "n_inner": FFN,
        "n_layer": LAYERS,
        "n_head": 4,
        "n_positions": 128,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "pad_token_id": pad_token_id,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return GPT2LMHeadModel(GPT2Config(**{**fields, **overrides}))


def tiny_bert(seed: int = 0, pad_token_id: int = 0, **overrides) -> BertForSequenceClassification:
    seed_everything(seed)
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_labels": 3,
        "pad_token_id": pad_token_id,
    }
    return BertForSequenceClassification(BertConfig(**{**fields, **overrides}))


def tiny_t5(seed: int = 0, pad_token_id: int = 0, **overrides) -> T5ForConditionalGeneration:
    seed_everything(seed)
    fields = {
        "vocab_size": VOCAB,
        "d_model": HIDDEN,
        "d_ff": FFN,
        "d_kv": 8,
        "num_layers": LAYERS,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
        "pad_token_id": pad_token_id,
        "eos_token_id": 2,
        "decoder_start_token_id": pad_token_id,
    }
    return T5ForConditionalGeneration(T5Config(**{**fields, **overrides}))


def padded_batch(
    lengths: list[int], seed: int = 0, side: str = "right", pad_token_id: int = 0, width: int | None = None
) -> dict[str, torch.Tensor]:
    """Random token ids with one row per length, padded to the longest (or to `width`), and their attention mask."""
    generator = torch.Generator().manual_seed(seed)
    width = width or max(lengths)
    input_ids = torch.full((len(lengths), width), pad_token_id)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        start = width - length if side == "left" else 0
        input_ids[row, start : start + length] = torch.randint(3, VOCAB, (length,), generator=generator)
        mask[row, start : start + length] = 1
    return {"input_ids": input_ids, "attention_mask": mask}


class OneLinear(nn.Module):
    """A model that is a single float64 layer called `linear`, with the batch arguments of a transformer."""

    def __init__(self, in_features: int, out_features: int, seed: int = 0) -> None:
        super().__init__()
        seed_everything(seed)
        self.linear = nn.Linear(in_features, out_features, bias=False, dtype=torch.float64)

    def forward(self, x, attention_mask=None, position_ids=None, seq_idx=None):
        return self.linear(x)


def adapted_linear(config, in_features: int = 7, out_features: int = 5, seed: int = 0) -> nn.Module:
    """A float64 `OneLinear` with an adapter of non-zero random weights, in train mode."""
    config.target_modules = {"linear"}
    config.init_weights = False
    model = get_peft_model(OneLinear(in_features, out_features, seed), config)
    return model.double().train()


def routed_layer_of(model: nn.Module) -> RoutedLayer:
    """The only routed layer of a model."""
    (layer,) = [module for module in model.modules() if isinstance(module, RoutedLayer)]
    return layer


def train(model: nn.Module, batch: dict[str, torch.Tensor], steps: int = 6, lr: float = 1e-2) -> list[float]:
    """Train on one batch with AdamW, every trainable tensor with a gradient in each step; the losses."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in trainable)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
