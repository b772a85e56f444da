"""Blocks that are compiled one by one inside a model that recomputes them: the router losses stay."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from moe_peft import PerftConfig
from tests.contract.cases import randomize
from tests.methods.esft_models import sparse_model, token_batch


def gradients(*, compiled: bool, use_reentrant: bool | None) -> list[dict[str, torch.Tensor]]:
    """Gradients of two steps, mostly of the router loss; `use_reentrant` None is without checkpointing."""
    torch._dynamo.reset()
    config = PerftConfig(r=2, num_experts=4, lora_dropout=0.0, router_aux_loss_coef=10.0)
    model = get_peft_model(sparse_model("olmoe", "grouped_mm"), config).train()
    randomize(model)
    if use_reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if compiled:
        for layer in model.base_model.model.model.layers:
            layer.mlp.compile(backend="eager")
    steps = []
    for seed in range(2):
        model.zero_grad()
        model(**token_batch(seed=seed)).loss.backward()
        steps.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    return steps


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_gradients_equal_those_without_compilation(use_reentrant):
    plain = gradients(compiled=False, use_reentrant=None)
    for found, expected in zip(gradients(compiled=True, use_reentrant=use_reentrant), plain, strict=True):
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))
