"""What a routed layer keeps for its backward pass: rank-sized tensors, and no copy of what is as wide as the model."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from moe_peft import LoraMoeConfig, MoloraConfig, MovConfig, RoutedConfig, SiraConfig
from moe_peft.ops.choice import FEW_ROWS, SEPARATE_ROWS
from tests.compare import saved_for_backward

D, OUT, E, R = 64, 96, 8, 4
SHAPE = {"r": R, "num_experts": E, "target_modules": ["0"]}
CONFIGS = {
    "loramoe": lambda: LoraMoeConfig(lora_dropout=0.0, **SHAPE),
    "molora": lambda: MoloraConfig(**SHAPE),
    "molora-top-2": lambda: MoloraConfig(top_k=2, **SHAPE),
    "sira": lambda: SiraConfig(**SHAPE),
    "top-2, balance and z-loss": lambda: RoutedConfig(router="top_k", top_k=2, router_z_loss_coef=0.001, **SHAPE),
}
# From the rows on for which it counts; two products, and one for many rows.
TOKENS = (FEW_ROWS + 1, SEPARATE_ROWS + 1)


def kept_of(config, num_tokens, dtype, autocast=False, adapter_float32=True):
    """Bytes kept per token besides x and parameters."""
    base = nn.Sequential(nn.Linear(D, OUT)).to(dtype)
    model = get_peft_model(base, config, autocast_adapter_dtype=adapter_float32).train()
    # No gradient of the input: stock layers would keep nothing more for it either.
    x = torch.randn(1, num_tokens, D, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        kept = saved_for_backward(lambda: model(x), besides=[x, *model.parameters()])
    return sum(tensor.untyped_storage().nbytes() for tensor in kept) / num_tokens, kept


@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize("adapter_float32", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_at_most_four_bytes_of_two_ranks_and_three_gates_per_token(name, dtype, adapter_float32, num_tokens):
    used, kept = kept_of(CONFIGS[name](), num_tokens, dtype, adapter_float32=adapter_float32)
    assert used <= 4 * (2 * E * R + 3 * E)
    assert not any(tensor.shape[-1] == D for tensor in kept), "a copy of the input"


@pytest.mark.parametrize("name", CONFIGS)
def test_few_rows_keep_what_plain_operators_keep(name):
    used, kept = kept_of(CONFIGS[name](), FEW_ROWS, torch.bfloat16, adapter_float32=False)
    # The cast input of the router, and the gated projections; nothing as wide as the output.
    assert used <= 4 * D + 4 * (3 * E * R + 10 * E)
    assert not any(tensor.shape[-1] == OUT for tensor in kept)


@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize("name", CONFIGS)
def test_autocast_keeps_no_copy_of_the_input(name, num_tokens):
    used, kept = kept_of(CONFIGS[name](), num_tokens, torch.float32, autocast=True)
    assert used <= 4 * (2 * E * R + 3 * E)
    assert not any(tensor.shape[-1] == D for tensor in kept)


@pytest.mark.parametrize("num_tokens", TOKENS)
def test_dropout_of_the_input_keeps_as_much_as_that_of_plain_lora(num_tokens):
    lora, _ = kept_of(LoraConfig(r=E * R, lora_dropout=0.05, target_modules=["0"]), num_tokens, torch.float32)
    own, _ = kept_of(LoraMoeConfig(lora_dropout=0.05, **SHAPE), num_tokens, torch.float32)
    assert own <= lora + 4 * 3 * E


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_keep_what_they_scale_once(dtype):
    config = MovConfig(num_experts=E, target_modules=["0"], feedforward_modules=[])
    used, _ = kept_of(config, 200, dtype)
    weights = 4 * E * OUT / 200  # the vectors' distance from one
    assert used <= OUT * dtype.itemsize + 4 * 3 * E + weights
