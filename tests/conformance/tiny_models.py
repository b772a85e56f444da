"""Tiny random models in local folders, in place of the ones that peft's tests take from the Hub."""

import tempfile
from functools import cache
from pathlib import Path

import torch
import transformers

_FOLDER = tempfile.TemporaryDirectory(prefix="tiny-models-")
_SIZES = {"vocab_size": 256, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
# peft's comparison of generated tokens strips the end-of-sequence token as padding.
_IDS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2}


def _llama(**kwargs: object) -> transformers.PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**_SIZES, **_HEADS, **_IDS, **kwargs}))


def _llama_classifier() -> transformers.PreTrainedModel:
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**_SIZES, **_HEADS, **_IDS))


def _olmoe() -> transformers.PreTrainedModel:
    experts = {"num_experts": 4, "num_experts_per_tok": 2}
    return transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**_SIZES, **_HEADS, **_IDS, **experts))


def _gpt2() -> transformers.PreTrainedModel:
    sizes = {"vocab_size": 256, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 128}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **_IDS))


def _t5() -> transformers.PreTrainedModel:
    sizes = {"vocab_size": 256, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    ids = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.T5Config(**sizes, **ids, feed_forward_proj="gated-gelu")
    return transformers.T5ForConditionalGeneration(config)


def _bert(cls: type) -> transformers.PreTrainedModel:
    return cls(transformers.BertConfig(**_SIZES, num_attention_heads=4, max_position_embeddings=128))


# peft's tests skip by pieces of a model's name, so the folders do not carry the architectures' names.
_MODELS = {
    "llama": ("decoder", _llama),
    # Fused 4-bit kernels of some processors need widths that are multiples of 32.
    "llama-wide": ("decoder-wide", lambda: _llama(hidden_size=64, intermediate_size=128, num_key_value_heads=4)),
    "llama-tied": ("decoder-tied", lambda: _llama(tie_word_embeddings=True)),
    "olmoe": ("decoder-sparse", _olmoe),
    "gpt2": ("decoder-conv1d", _gpt2),
    "t5": ("encoder-decoder", _t5),
    "bert": ("encoder", lambda: _bert(transformers.BertModel)),
    "bert-classifier": ("encoder-classifier", lambda: _bert(transformers.BertForSequenceClassification)),
    "llama-classifier": ("decoder-classifier", _llama_classifier),
}


@cache
def tiny_model(name: str) -> str:
    """Save a tiny model of the given kind once per process, and return its folder."""
    folder, build = _MODELS[name]
    path = Path(_FOLDER.name) / folder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        build().eval().save_pretrained(path)
    return str(path)
