"""A wrapped linear layer: shapes, dtypes, ownership of the base output, and mixed rows."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from moe_peft import LoraMoeConfig, RoutedConfig
from tests.contract.cases import randomize


def layer_of(base: nn.Module, config=None):
    """The routed layer around `base`, with random adapter weights, in eval mode."""
    model = get_peft_model(nn.Sequential(base), config or LoraMoeConfig(target_modules=["0"], num_experts=3)).eval()
    randomize(model)
    return model.base_model.model[0]


def test_two_dimensional_and_empty_inputs_pass_through():
    layer = layer_of(nn.Linear(12, 8))
    x = torch.randn(3, 5, layer.in_features)
    expected = layer(x)
    torch.testing.assert_close(layer(x.reshape(-1, layer.in_features)).view(3, 5, -1), expected)
    torch.testing.assert_close(layer(x[0, 0]), expected[0, 0])
    assert layer(x[:0]).shape == (0, 5, layer.out_features)
    assert layer(x[:, :0]).shape == (3, 0, layer.out_features)


def test_forward_hooks_of_the_base_layer_see_its_own_output():
    layer = layer_of(nn.Linear(12, 8))
    seen = []
    layer.base_layer.register_forward_hook(lambda module, args, output: seen.append(output))
    x = torch.randn(4, layer.in_features)
    layer(x)
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=0)


def test_a_convolution_of_width_one_equals_the_linear_layer_with_its_transpose():
    linear = nn.Linear(12, 8)
    conv = Conv1D(8, 12)
    conv.weight.data, conv.bias.data = linear.weight.data.T.contiguous(), linear.bias.data.clone()
    config = LoraMoeConfig(target_modules=["0"], num_experts=1)
    layers = [layer_of(base, copy.deepcopy(config)) for base in (linear, conv)]
    x = torch.randn(5, 12)
    expected = layers[0](x)
    torch.testing.assert_close(layers[1](x), expected)
    for layer in layers:
        layer.merge()
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_do_not_depend_on_adding_in_place(bias):
    layer = layer_of(nn.Linear(12, 8, bias=bias), RoutedConfig(target_modules=["0"], num_experts=3))
    twin = copy.deepcopy(layer)
    twin._owns_output = False
    x = torch.randn(2, 5, 12)
    results = []
    for module in (layer, twin):
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        out.square().sum().backward()
        results.append([out.detach(), leaf.grad, *[p.grad for p in module.parameters() if p.requires_grad]])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_sixteen_bit_input_computes_in_sixteen_bits_with_float32_logits():
    layer = layer_of(nn.Linear(12, 8).to(torch.bfloat16))
    x = torch.randn(5, 12, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    logits = layer.router["default"].scores(x, layer.tracker.tokens(x))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, x.float() @ layer.router["default"].weight.T)


def test_weights_that_are_not_finite_are_not_merged_safely():
    layer = layer_of(nn.Linear(12, 8), LoraMoeConfig(target_modules=["0"], num_experts=1))
    layer.experts["default"].A.data[0, 0, 0] = float("nan")
    before = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before) and not layer.merged


def test_training_a_layer_outside_its_models_forward_warns_once():
    from moe_peft import MoePeftWarning

    layer = layer_of(nn.Linear(12, 8)).train()
    x = torch.randn(2, 12)
    with torch.no_grad():
        layer(x)
    with pytest.warns(MoePeftWarning, match="router losses, dropout and capacity are off"):
        layer(x)
    layer(x)
