"""PERFT on a 4-bit base: attention packed as it is loaded, fused experts packed as parametrizations, on CPU."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, OlmoeConfig, OlmoeForCausalLM, set_seed

from moe_peft import PerftConfig, describe
from moe_peft.layers import RoutedLayer
from tests.contract.cases import randomize
from tests.tiny import VOCAB, padded_batch, train

pytestmark = pytest.mark.bnb
bitsandbytes = pytest.importorskip("bitsandbytes")
pack = pytest.importorskip("bitsandbytes.nn.parametrize").replace_parameter_4bit

VARIANTS = ("R", "E", "D", "S")
FOUR_BIT = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    set_seed(0)
    folder = tmp_path_factory.mktemp("base")
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
    }
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    OlmoeForCausalLM(OlmoeConfig(**sizes, **experts)).save_pretrained(folder)
    return folder


def load(folder, implementation: str = "eager"):
    """A frozen model whose attention and whose experts are 4-bit."""
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=FOUR_BIT, dtype=torch.float32)
    for layer in model.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            pack(layer.mlp.experts, name, quant_type="nf4")
    model.set_experts_implementation(implementation)
    return model.eval().requires_grad_(False)


def config(variant: str) -> PerftConfig:
    return PerftConfig(variant=variant, r=4, task_type="CAUSAL_LM")


def test_the_base_is_packed_everywhere_but_in_its_routers(base_folder):
    model = load(base_folder)
    block = model.model.layers[0].mlp
    assert type(model.model.layers[0].self_attn.q_proj) is bitsandbytes.nn.Linear4bit
    assert parametrize.is_parametrized(block.experts)
    assert {p.dtype for p in block.experts.parameters()} == {torch.uint8}
    assert block.gate.weight.dtype == torch.float32


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_fresh_adapters_change_no_bit_of_a_packed_base(base_folder, variant, implementation):
    batch, base = padded_batch([9, 6, 9]), load(base_folder, implementation)
    expected = base(**batch).logits
    model = get_peft_model(base, config(variant)).eval()
    assert torch.equal(model(**batch).logits, expected)
    dtypes = {p.dtype for name, p in model.named_parameters() if "perft_" in name}
    assert dtypes == {torch.float32}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_packed_base_trains_and_comes_back(base_folder, tmp_path, variant):
    batch = padded_batch([9, 6, 9])
    model = get_peft_model(load(base_folder), config(variant)).train()
    packed = {n: p.clone() for n, p in model.named_parameters() if p.dtype == torch.uint8}
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(packed) == 12 and trainable and all("perft_" in name for name in trainable)
    losses = train(model, batch, steps=8)
    assert losses[-1] < losses[0] - 0.02
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in packed.items())

    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(base_folder), tmp_path).eval()
    # bitsandbytes may repack weights between training and evaluation, so the trained adapters move to a fresh base.
    fresh = get_peft_model(load(base_folder), config(variant)).eval()
    for name, parameter in trainable.items():
        assert torch.equal(again.get_parameter(name), parameter), name
        fresh.get_parameter(name).data.copy_(parameter)
    with torch.no_grad():  # its kernels differ where inputs have gradients
        assert torch.equal(again(**batch).logits, fresh(**batch).logits)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpointed_gradients_on_a_packed_base_equal_those_without(base_folder, variant, use_reentrant):
    batch = padded_batch([9, 6, 9])
    model = get_peft_model(load(base_folder), PerftConfig(variant=variant, r=4, lora_dropout=0.0)).train()
    randomize(model)
    gradients = []
    model.enable_input_require_grads()
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0] and gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("variant", VARIANTS)
def test_places_and_counts_are_those_of_the_plain_model(base_folder, variant):
    plain = describe(AutoModelForCausalLM.from_pretrained(base_folder), config(variant))
    packed = describe(load(base_folder), config(variant))
    assert [place.name for place in packed.places] == [place.name for place in plain.places]
    assert packed.parameters == plain.parameters


def test_layers_around_packed_experts_are_found_by_their_places(base_folder):
    model = get_peft_model(load(base_folder), config("E"))
    layers = [module for module in model.modules() if isinstance(module, RoutedLayer)]
    assert [layer.num_backbone_experts for layer in layers] == [4, 4]
