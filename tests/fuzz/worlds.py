"""Tiny models of several architectures, their batches, and what of them an adapter can wrap."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
import transformers
from torch import nn

from tests.backbones.models import EXPERTS, tiny_model
from tests.contract.cases import tiny_deepseek_v2, tiny_olmoe, tiny_qwen3
from tests.tiny import HIDDEN, LAYERS, VOCAB, tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_t5


@dataclass(frozen=True)
class World:
    """An architecture.

    Attributes:
        build: Builds the model.
        task_type: Of the adapters.
        linears: Ends of names of linear layers that adapters may name.
        has_blocks: Whether an MLP or a mixture-of-experts block can be found.
        num_experts: Of one experts module of the backbone, 0 where there is none.
        generates: Whether `generate` exists.
    """

    name: str
    build: Callable[[], nn.Module]
    task_type: str
    linears: tuple[str, ...]
    has_blocks: bool = True
    num_experts: int = 0
    generates: bool = True

    def base(self) -> nn.Module:
        """A frozen copy in eval mode."""
        return copy.deepcopy(_frozen(self.name))

    def batch(self, rng: random.Random, labels: bool = False) -> dict[str, torch.Tensor]:
        """A batch of one to three rows of one to nine tokens, some of them padded."""
        rows, width = rng.randint(1, 3), rng.choice((1, 2, 5, 9))
        width = max(width, 2) if labels else width
        generator = torch.Generator().manual_seed(rng.randrange(2**31))
        ids = torch.randint(3, VOCAB, (rows, width), generator=generator)
        batch = {"input_ids": ids}
        if rng.random() < 0.7 and self.name != "mamba":
            mask = torch.ones_like(ids)
            if rows > 1 and width > 2:
                mask[1, 2:] = 0
            batch["attention_mask"] = mask
        if self.task_type == "SEQ_2_SEQ_LM":
            batch["labels"] = torch.randint(3, VOCAB, (rows, 4), generator=generator)
        elif self.task_type == "SEQ_CLS":
            batch["labels"] = torch.arange(rows) % 3
        elif labels:
            batch["labels"] = ids.clone()
        return batch


def tiny_mamba() -> nn.Module:
    transformers.set_seed(0)
    config = transformers.MambaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, state_size=4, num_hidden_layers=LAYERS, pad_token_id=0
    )
    return transformers.MambaForCausalLM(config)


def _of_type(model_type: str) -> nn.Module:
    model = tiny_model(model_type)
    model.set_experts_implementation("eager")
    return model


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
WORLDS = {
    world.name: world
    for world in (
        World("llama", tiny_llama, "CAUSAL_LM", (*ATTENTION, *MLP)),
        World("qwen3", tiny_qwen3, "CAUSAL_LM", (*ATTENTION, *MLP)),
        World("gpt2", tiny_gpt2, "CAUSAL_LM", ("c_attn", "c_fc", "mlp.c_proj")),
        World(
            "bert", tiny_bert, "SEQ_CLS", ("query", "value", "intermediate.dense"), has_blocks=False, generates=False
        ),
        World("t5", tiny_t5, "SEQ_2_SEQ_LM", ("q", "v", "wi_0", "wo")),
        World("mamba", tiny_mamba, "CAUSAL_LM", ("in_proj",), has_blocks=False),
        World("olmoe", tiny_olmoe, "CAUSAL_LM", ATTENTION, num_experts=4),
        World("mixtral", tiny_mixtral, "CAUSAL_LM", ATTENTION, num_experts=4),
        World("deepseek_v2", tiny_deepseek_v2, "CAUSAL_LM", ("kv_b_proj", "o_proj"), num_experts=4),
        World("gpt_oss", partial(_of_type, "gpt_oss"), "CAUSAL_LM", ATTENTION, num_experts=EXPERTS),
        World("qwen3_moe", partial(_of_type, "qwen3_moe"), "CAUSAL_LM", ATTENTION, num_experts=EXPERTS),
    )
}


@cache
def _frozen(name: str) -> nn.Module:
    return WORLDS[name].build().eval().requires_grad_(False)
