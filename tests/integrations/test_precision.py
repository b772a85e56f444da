"""What a trainer's cast must not round is float32 again, and everything else keeps the dtype it was given."""

from __future__ import annotations

import torch
from peft import get_peft_model

from moe_peft import MovConfig
from moe_peft.integrations.precision import restore_precision
from tests.integrations.test_callback import adapted
from tests.tiny import tiny_llama


def test_routers_turned_to_sixteen_bit_are_float32_again():
    model = adapted()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    places = sum("_router." in name for name, _ in model.named_parameters())
    assert restore_precision(model) == places
    for name, parameter in model.named_parameters():
        if "_router." in name:
            assert parameter.dtype == torch.float32
        elif "_experts." in name:
            assert parameter.dtype == torch.bfloat16


def test_vectors_turned_to_sixteen_bit_are_float32_again_and_take_small_steps():
    model = get_peft_model(tiny_llama(), MovConfig(task_type="CAUSAL_LM", num_experts=2))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    vectors = [p for name, p in model.named_parameters() if name.endswith(".vectors")]
    assert restore_precision(model) == 2 * len(vectors)
    assert all(torch.equal(p, torch.ones_like(p)) and p.dtype == torch.float32 for p in vectors)
    assert not torch.equal(vectors[0] - 3e-4, vectors[0]) and (vectors[0].bfloat16() - 3e-4).eq(1).all()
