"""Tiny models with stock peft's LoRA on their fused experts."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from moe_peft.places.expert_parameters import expert_parameters
from tests.contract.cases import tiny_olmoe
from tests.tiny import padded_batch

BATCH = padded_batch([9, 6], seed=3)


def stock_config(base: nn.Module, **overrides) -> LoraConfig:
    fields = {"r": 3, "lora_alpha": 5, "target_modules": [], "task_type": "CAUSAL_LM"}
    if "target_parameters" not in overrides:
        overrides["target_parameters"] = expert_parameters(base)
    return LoraConfig(**{**fields, **overrides})


def fill(model: nn.Module, seed: int = 1) -> None:
    """Give every LoRA factor random values."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def stock_lora(base: nn.Module | None = None, **overrides) -> PeftModel:
    """A model with LoRA on all matrices of its experts and on its attention, in evaluation mode."""
    base = tiny_olmoe().double() if base is None else base
    model = get_peft_model(base, stock_config(base, **overrides)).eval()
    fill(model)
    return model


def logits_and_gradients(model: nn.Module, batch=None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    batch = BATCH if batch is None else batch
    model.zero_grad()
    out = model(**batch, labels=batch["input_ids"])
    out.loss.backward()
    return out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal_to(found, expected, tolerance: float = 1e-12) -> None:
    """Same logits, and a gradient for the same tensors, each to its own size."""
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=tolerance * float(expected[0].abs().max()))
    assert found[1].keys() == expected[1].keys() and expected[1]
    for name, wanted in expected[1].items():
        scale = float(wanted.abs().max()) + 1e-30
        torch.testing.assert_close(
            found[1][name], wanted, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def experts_of(model: nn.Module) -> nn.Module:
    """The backbone's own experts module of the first layer."""
    module = model.get_base_model().model.layers[0].mlp.experts
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module
