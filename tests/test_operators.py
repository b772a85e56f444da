"""How many operators an adapter adds to a step of few tokens, which is what such a step costs.

Counted by the dispatcher, so that no machine disturbs the figures: in a step of 16 tokens, forward and backward apart,
and for one decoded token, each for a place, less those of the frozen model. What a pass does once, as for router
losses, is shared out over the places. Stock LoRA and (IA)3 stand beside the routed adapters.
"""

from __future__ import annotations

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from moe_peft import LoraMoeConfig, MoloraConfig, MovConfig, RoutedConfig, SiraConfig

FFN = ["gate_proj", "up_proj", "down_proj"]
LAYERS, PLACES, TOKENS = 2, 6, 16
SHAPE = {"r": 4, "num_experts": 8, "target_modules": FFN}
VECTORS = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
# Name -> (configuration, operators of decoding, of the forward, of the backward), for a place.
CEILINGS = {
    "lora": (lambda: LoraConfig(r=32, target_modules=FFN), 10, 10, 20),
    "molora": (lambda: MoloraConfig(**SHAPE), 11, 14, 33),
    "loramoe": (lambda: LoraMoeConfig(lora_dropout=0.0, **SHAPE), 11, 35, 34),
    "top-2, balance and z-loss": (
        lambda: RoutedConfig(router="top_k", top_k=2, router_z_loss_coef=0.001, **SHAPE),
        14,
        40,
        39,
    ),
    "sira": (lambda: SiraConfig(**SHAPE), 14, 51, 40),
    "ia3": (lambda: IA3Config(**VECTORS), 3, 3, 7),
    "mov": (lambda: MovConfig(num_experts=8, **VECTORS), 17, 22, 31),
}


class Operators(TorchDispatchMode):
    """Counts what is dispatched."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def base():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=LAYERS, pad_token_id=0, **sizes)).requires_grad_(False)


def counted(model):
    """Operators of one decoded token, of a training forward, and of its backward."""
    ids = torch.randint(1, 64, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    with torch.no_grad():
        cache = model.eval()(input_ids=ids, use_cache=True).past_key_values
        with Operators() as decoding:
            model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
    model.train()(inputs_embeds=embedded, labels=ids)
    with Operators() as forward:
        loss = model(inputs_embeds=embedded, labels=ids).loss
    with Operators() as backward:
        loss.backward()
    return decoding.count, forward.count, backward.count


@pytest.fixture(scope="module")
def frozen():
    model = base()
    return model, counted(copy.deepcopy(model))


@pytest.mark.parametrize("name", CEILINGS)
def test_a_place_makes_no_more_operators_than_it_needs(name, frozen):
    model, own = frozen
    config, *ceilings = CEILINGS[name]
    adapted = get_peft_model(copy.deepcopy(model), config(), autocast_adapter_dtype=False)
    found = [(count - before) / PLACES for count, before in zip(counted(adapted), own, strict=True)]
    assert all(count <= ceiling for count, ceiling in zip(found, ceilings, strict=True)), found
