"""Adapters on bitsandbytes 4-bit and 8-bit linear layers, on CPU."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from moe_peft import LoraMoeConfig, MovConfig, PerftConfig, RoutedConfig, describe
from moe_peft.layers import RoutedLayer
from tests.adapter_types import ROUTED_SUMS
from tests.contract.cases import randomize
from tests.tiny import padded_batch, tiny_llama, train

pytestmark = pytest.mark.bnb
pytest.importorskip("bitsandbytes")

QUANTIZATIONS = {
    "nf4-double-quant": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "nf4-bfloat16-compute": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "8bit": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return folder


def load(folder, quantization: str):
    """A quantized model, frozen as peft freezes it: bitsandbytes picks another kernel for inputs with gradients."""
    config = BitsAndBytesConfig(**QUANTIZATIONS[quantization])
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("config_cls", [*ROUTED_SUMS, MovConfig, PerftConfig])
def test_quantized_base_trains_and_comes_back(base_folder, tmp_path, config_cls, quantization):
    batch = padded_batch([9, 6, 9])
    base = load(base_folder, quantization)
    expected = base(**batch).logits
    model = get_peft_model(base, config_cls(task_type="CAUSAL_LM")).eval()
    assert torch.equal(model(**batch).logits, expected)
    kind = "bnb 8bit" if quantization == "8bit" else "bnb 4bit"
    layers = [module for module in model.modules() if isinstance(module, RoutedLayer)]
    assert layers
    if config_cls is PerftConfig:  # wraps the MLP, whose linear layers are quantized
        linear = "Linear8bitLt" if quantization == "8bit" else "Linear4bit"
        assert {type(layer.base_layer.down_proj).__name__ for layer in layers} == {linear}
    else:
        assert all(layer.quantization_backend.backend_name == kind for layer in layers)
        assert f"quantization_backend='{kind}'" in repr(model)

    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trainable} == {torch.float32}
    losses = train(model, batch)
    if config_cls is MovConfig:  # vectors only rescale what a random model computes, which hardly matters to its loss
        assert all(not p.eq(1).any() for name, p in model.named_parameters() if name.endswith(".vectors"))
    else:
        assert losses[-1] < losses[0] - 0.05

    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        trained = model(**batch).logits
    for low_cpu_mem_usage in (False, True):
        again = PeftModel.from_pretrained(
            load(base_folder, quantization), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
        ).eval()
        state = again.state_dict()
        for name, tensor in model.state_dict().items():
            if "_experts." in name or "_router." in name:
                assert torch.equal(state[name], tensor), name
        # On some CPUs bitsandbytes repacks 4-bit weights between training and evaluation, which rounds them again.
        with torch.no_grad():
            torch.testing.assert_close(
                again(**batch).logits, trained, rtol=0.02, atol=0.1 if "bfloat16" in quantization else 0.02
            )


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_kbit_preparation_and_checkpointing_train(base_folder, quantization):
    batch = padded_batch([9, 6, 9])
    model = get_peft_model(prepare_model_for_kbit_training(load(base_folder, quantization)), RoutedConfig()).train()
    randomize(model)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("quantization", ["nf4-double-quant", "8bit"])
def test_one_expert_merges_into_a_quantized_base_to_its_rounding(base_folder, quantization):
    batch = padded_batch([9, 6, 9])
    model = get_peft_model(load(base_folder, quantization), LoraMoeConfig(num_experts=1, lora_alpha=8)).eval()
    for name, parameter in model.named_parameters():
        if "_experts." in name:
            parameter.data.normal_(std=0.05)
    expected = model(**batch).logits
    merged = model.merge_and_unload()
    error = (merged(**batch).logits - expected).norm() / expected.norm()
    assert error < (0.35 if quantization.startswith("nf4") else 0.05)


@pytest.mark.parametrize("quantization", ["nf4-double-quant", "nf4-bfloat16-compute", "8bit"])
def test_one_vector_merges_into_a_quantized_base_to_its_rounding_and_comes_out_again(base_folder, quantization):
    batch = padded_batch([9, 6, 9])
    base = load(base_folder, quantization)
    plain = base(**batch).logits
    model = get_peft_model(base, MovConfig(num_experts=1)).eval()
    for name, parameter in model.named_parameters():
        if "_experts." in name:
            nn.init.normal_(parameter, mean=1.0, std=0.3)
    weights = [m.get_base_weight().clone() for m in model.modules() if isinstance(m, RoutedLayer)]
    expected = model(**batch).logits
    model.merge_adapter()
    error = (model(**batch).logits - expected).norm() / expected.norm()
    assert 0 < error < (0.2 if quantization.startswith("nf4") else 0.02)
    model.unmerge_adapter()
    for layer, weight in zip((m for m in model.modules() if isinstance(m, RoutedLayer)), weights, strict=True):
        assert (layer.get_base_weight() - weight).norm() < 0.01 * weight.norm()
    assert (model(**batch).logits - expected).norm() < 0.05 * expected.norm()
    with model.disable_adapter():
        assert (model(**batch).logits - plain).norm() < 0.05 * plain.norm()


def test_description_counts_the_weights_of_packed_parameters(base_folder):
    config = LoraMoeConfig()
    plain = describe(AutoModelForCausalLM.from_pretrained(base_folder), config)
    packed = describe(load(base_folder, "nf4-double-quant"), config)
    assert packed.base_parameters == plain.base_parameters
    assert packed.num_parameters == plain.num_parameters
    assert {place.kind for place in packed.places} == {"Linear4bit"}


@pytest.mark.parametrize("quantization", ["nf4-double-quant", "8bit"])
@pytest.mark.parametrize("safe_merge", [False, True])
@torch.no_grad()
def test_each_merged_weight_is_the_exact_one_to_its_rounding(base_folder, quantization, safe_merge):
    model = get_peft_model(load(base_folder, quantization), LoraMoeConfig(num_experts=1, lora_alpha=8)).eval()
    randomize(model)
    layers, exact = [m for m in model.modules() if isinstance(m, RoutedLayer)], []
    for layer in layers:
        bank = layer.experts["default"]
        exact.append(layer.get_base_weight() + bank.scaling * (bank.A[0].T @ bank.B[0]).T)
    model.merge_adapter(safe_merge=safe_merge)
    for layer, expected in zip(layers, exact, strict=True):
        error = (layer.get_base_weight() - expected).norm() / expected.norm()
        assert error < (0.12 if quantization.startswith("nf4") else 0.02), layer.place


@pytest.mark.parametrize("quantization", ["nf4-double-quant", "8bit"])
@pytest.mark.parametrize("kind", [LoraMoeConfig, MovConfig])
@torch.no_grad()
def test_quantized_layers_merge_all_or_none(kind, base_folder, quantization, monkeypatch):
    model, batch = (
        get_peft_model(load(base_folder, quantization), LoraMoeConfig(num_experts=1)).eval(),
        padded_batch([5]),
    )
    randomize(model)
    expected = model(**batch).logits
    layers = [module for module in model.modules() if isinstance(module, RoutedLayer)]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    def assert_as_before():
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
        assert torch.equal(model(**batch).logits, expected) and not any(layer.merged for layer in layers)

    def stop(**kwargs):
        raise KeyboardInterrupt

    for last in (layers[0], layers[-1]):  # whichever is merged last
        monkeypatch.setattr(last, "merge", stop)
        with pytest.raises(KeyboardInterrupt):
            model.merge_adapter()
        assert_as_before()
        monkeypatch.undo()
    first = next(layers[0].experts.parameters())
    first.view(-1)[0] = float("inf")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)
    first.view(-1)[0] = before[next(n for n, p in model.named_parameters() if p is first)].view(-1)[0]
    assert_as_before()
