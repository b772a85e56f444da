"""Every pair of registered parts beside a layer that bitsandbytes keeps in four bits."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from moe_peft import routed_layers
from tests.contract.cases import randomize

from .cases import PAIRS, config_of, context, on_layers, parts_of

bitsandbytes = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.bnb
WIDTH = 64


class FourBit(nn.Module):
    """A model that is a single linear layer in four bits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = bitsandbytes.nn.Linear4bit(
            WIDTH, WIDTH, bias=False, quant_type="nf4", compute_dtype=torch.float32
        )
        self.to("cpu")

    def forward(self, x):
        return self.linear(x)


@on_layers(PAIRS)
def test_a_layer_in_four_bits_starts_as_it_was_and_trains_in_float32(choice):
    base, x_TD = FourBit().requires_grad_(False), torch.randn(12, WIDTH)
    assert base.linear.weight.quant_state is not None
    expected, packed = base(x_TD), base.linear.weight.clone()
    (layer,) = routed_layers(get_peft_model(base, config_of(choice, losses=False, target_modules=["linear"])))
    found = layer.add("default", x_TD, expected.clone(), context())
    assert torch.equal(found, expected), "the tensors in `up` start at zero and add exactly nothing"
    assert {p.dtype for part in parts_of(layer) for p in part.parameters()} <= {torch.float32}
    randomize(layer)
    layer.add("default", x_TD, expected.clone(), context(training=True)).square().sum().backward()
    for part in parts_of(layer):
        for name, parameter in part.named_parameters():
            where = f"{type(part).__name__}.{name}"
            assert (parameter.grad is not None) == (name not in part.frozen), where
            assert parameter.grad is None or torch.isfinite(parameter.grad).all(), where
    assert torch.equal(layer.base_layer.weight, packed)
