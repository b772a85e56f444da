"""What an experts module is read as: matrices, biases, gates and norms of every layout, or a reason why not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_peft.backbone.structure import find_moe_layers
from moe_peft.layers.fused_experts import matrix_names, read_fused, stored_shape, why_not_fused
from moe_peft.ops.expert_lora import dense_expert_lora
from tests.backbones.models import tiny_model


def experts_of(model_type):
    model = tiny_model(model_type)
    return model.get_submodule(find_moe_layers(model)[0].experts)


@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss", "nemotron_h", "longcat_flash", "deepseek_v3"])
def test_the_definition_on_what_was_read_is_the_modules_own_output(model_type):
    experts = experts_of(model_type)
    fused = read_fused(experts)
    width = fused.first.stack.matrix(0).shape[0]
    generator = torch.Generator().manual_seed(0)
    x, index = torch.randn(5, width, generator=generator), torch.tensor([[0, 1], [2, 3], [1, 0], [3, 2], [0, 2]])
    weights = torch.rand(5, 2, generator=generator)
    torch.testing.assert_close(
        dense_expert_lora(fused, x, index, weights), type(experts).forward(experts, x, index, weights)
    )


def test_names_and_shapes_of_matrices():
    assert matrix_names(experts_of("olmoe")) == ("gate_up_proj", "down_proj")
    assert matrix_names(experts_of("nemotron_h")) == ("up_proj", "down_proj")
    assert matrix_names(nn.Linear(2, 2)) is None
    experts = experts_of("longcat_flash")
    assert stored_shape(experts, "gate_up_proj")[0] == stored_shape(experts, "down_proj")[0] + 3
    assert read_fused(experts).num_experts == stored_shape(experts, "down_proj")[0]


def test_packed_matrices_are_read_without_dequantizing_the_stack(monkeypatch):
    pytest.importorskip("bitsandbytes")
    from moe_peft.quantization.four_bit import Dequantize, dequantize_on_read, quantize

    experts = experts_of("olmoe")
    shape = tuple(experts.gate_up_proj.shape)
    for name in ("gate_up_proj", "down_proj"):
        dequantize_on_read(experts, name, *quantize(getattr(experts, name)))
    monkeypatch.setattr(Dequantize, "forward", lambda *_: pytest.fail("the whole stack was read"))
    assert matrix_names(experts) == ("gate_up_proj", "down_proj")
    assert stored_shape(experts, "gate_up_proj") == shape
    assert why_not_fused(experts) is None
    assert read_fused(experts).first.stack.packed


def test_reasons():
    assert "another form than two stacks" in why_not_fused(nn.Linear(2, 2))
    experts = experts_of("olmoe")
    assert why_not_fused(experts) is None
    experts = experts_of("olmoe")
    experts.gate_up_proj.data = experts.gate_up_proj.data.to(torch.float8_e4m3fn)
    assert "quantized" in why_not_fused(experts)
    experts = experts_of("olmoe")
    nn.utils.parametrize.register_parametrization(experts, "down_proj", nn.Identity())
    assert "another parametrization" in why_not_fused(experts)
    # Without the interface's flags and without weights no trial can be made.
    assert "way of its own" in why_not_fused(experts_of("longcat_flash").to("meta"))
