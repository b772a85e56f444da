"""Names of expert matrices: what stock peft takes as target_parameters, on every kind of model, or a clear refusal."""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper

from moe_peft import expert_parameters
from tests.backbones.models import tiny_model
from tests.contract.cases import tiny_olmoe
from tests.tiny import tiny_llama


@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        ("olmoe", ["down_proj", "gate_up_proj"]),
        ("gpt_oss", ["down_proj", "gate_up_proj"]),
        ("nemotron_h", ["down_proj", "up_proj"]),
        ("jetmoe", ["mlp.input_linear.weight", "mlp.output_linear.weight"]),
        ("llama4_text", ["down_proj", "gate_up_proj"]),
    ],
)
def test_stock_peft_adapts_exactly_the_matrices_that_are_named(model_type, names):
    base = tiny_model(model_type)
    assert expert_parameters(base) == names
    matrices = [n for n, p in base.named_parameters() if p.dim() == 3 and n.endswith(tuple(names)) and "attn" not in n]
    model = get_peft_model(base, LoraConfig(r=2, target_modules=[], target_parameters=names))
    wrapped = [m for m in model.modules() if isinstance(m, ParamWrapper)]
    assert len(wrapped) == len(matrices) > 0


def test_an_adapted_model_has_the_same_names():
    base = tiny_olmoe()
    names = expert_parameters(base)
    assert (
        expert_parameters(get_peft_model(base, LoraConfig(r=2, target_modules=[], target_parameters=names))) == names
    )


def test_shared_experts_are_left_out():
    assert all("shared" not in name for name in expert_parameters(tiny_model("inkling_text")))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (tiny_llama, "dense model"),
        (lambda: tiny_model("dbrx"), "no 3-D parameters"),
        (lambda: tiny_model("switch_transformers"), "no 3-D parameters"),
    ],
)
def test_models_without_such_matrices_are_refused_with_the_reason(build, reason):
    with pytest.raises(ValueError, match=reason):
        expert_parameters(build())


def test_four_bit_experts_are_refused_with_what_to_use():
    pytest.importorskip("bitsandbytes")
    from moe_peft.quantization.four_bit import dequantize_on_read, quantize

    model = tiny_olmoe()
    experts = model.model.layers[0].mlp.experts
    dequantize_on_read(experts, "down_proj", *quantize(experts.down_proj))
    with pytest.raises(ValueError, match="Use the expert LoRA of moe_peft"):
        expert_parameters(model)
