"""Tensors beside an adapter's own are found under stock names."""

from __future__ import annotations

import torch
from peft import get_peft_model

from moe_peft import MoloraConfig
from moe_peft.tools.beside import further_tensors
from tests.tiny import tiny_llama


def test_modules_in_full_and_tokens_are_found_and_nothing_else():
    alone = get_peft_model(tiny_llama(), MoloraConfig())
    assert further_tensors(alone, "default") == {}
    config = MoloraConfig(modules_to_save=["lm_head"], trainable_token_indices=[3])
    model = get_peft_model(tiny_llama(), config)
    found = further_tensors(model, "default")
    head, tokens = "base_model.model.lm_head.weight", "base_model.model.model.embed_tokens"
    assert set(found) == {head, f"{tokens}.token_adapter.trainable_tokens_delta"}
    own = model.get_base_model().lm_head.modules_to_save["default"].weight
    assert torch.equal(found[head], own) and found[head].data_ptr() != own.data_ptr()
