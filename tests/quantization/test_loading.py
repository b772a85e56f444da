"""A model that is packed as it is loaded: experts in 4 bits, routers not, and the numbers of packing it afterwards."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers.auto import AutoQuantizationConfig

from moe_peft import EsftConfig, MoeBitsAndBytesConfig, MovConfig, PerftConfig, describe, score_experts
from moe_peft.backbone.sizes import num_base_weights
from moe_peft.quantization.four_bit import Dequantize, quantize
from moe_peft.quantization.loading import expert_parameters, expert_sizes
from tests.backbones.models import tiny_model
from tests.tiny import padded_batch, tiny_llama, train

pytestmark = pytest.mark.bnb
bitsandbytes = pytest.importorskip("bitsandbytes")

# Fused or one by one in the checkpoint, with biases, transposed, with shared experts, without a block, latent.
TYPES = ["olmoe", "qwen3_moe", "gpt_oss", "mixtral", "deepseek_v3", "gemma4_text", "nemotron_h"]
NF4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
ADAPTERS = {
    "perft-r": PerftConfig(variant="R", num_experts=4, r=2, lora_dropout=0.0, task_type="CAUSAL_LM"),
    "perft-e": PerftConfig(variant="E", r=2, lora_dropout=0.0, task_type="CAUSAL_LM"),
    "esft": EsftConfig(experts={"0": [0, 1], "1": [1, 2]}, task_type="CAUSAL_LM"),
    "esft-lora": EsftConfig(experts={"0": [0], "1": [1]}, expert_adapter="lora", r=2, task_type="CAUSAL_LM"),
    "mov": MovConfig(num_experts=4, task_type="CAUSAL_LM"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder_of(model_type):
        if model_type not in made:
            made[model_type] = tmp_path_factory.mktemp(model_type)
            tiny_model(model_type).save_pretrained(made[model_type])
        return made[model_type]

    return folder_of


def load(folder, dtype=torch.float32, **kwargs):
    config = MoeBitsAndBytesConfig(**{**NF4, **kwargs})
    # In training, as bitsandbytes repacks linear layers for evaluation on some processors, which needs wider ones.
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype).train()


def packed_afterwards(folder, skip, dtype=torch.float32, **kwargs):
    """Stock 4-bit loading of the linear layers, and experts that are quantized and unpacked again."""
    stock = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skip, **{**NF4, **kwargs})
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=stock, dtype=dtype).train()
    for name in expert_parameters(model):
        parameter = model.get_parameter(name)
        assert parameter.dtype == dtype, "transformers quantizes experts by itself"
        kind, double = (
            kwargs.get(f"bnb_4bit_{key}", value) for key, value in (("quant_type", "nf4"), ("use_double_quant", False))
        )
        parameter.data = bitsandbytes.functional.dequantize_4bit(*quantize(parameter, kind, double))
    return model


def nothing_is_kept(model):
    return all(m.kept is None and not m.keeps for m in model.modules() if isinstance(m, Dequantize))


@torch.no_grad()
def logits(model):
    return model(input_ids=padded_batch([7, 7], seed=4)["input_ids"]).logits


@pytest.mark.parametrize("model_type", TYPES)
def test_loading_packed_equals_packing_what_was_loaded(folders, model_type):
    folder = folders(model_type)
    model = load(folder)
    quantizer = model.hf_quantizer
    assert torch.equal(logits(model), logits(packed_afterwards(folder, quantizer.modules_to_not_convert)))
    plain = AutoModelForCausalLM.from_pretrained(folder)
    names = expert_parameters(plain)
    assert sorted(quantizer.expert_bytes) == sorted(quantizer.quantized_bytes) == sorted(names)
    assert expert_sizes(plain, torch.float32) == (
        sum(quantizer.expert_bytes.values()),
        sum(quantizer.quantized_bytes.values()),
    )
    assert num_base_weights(model) == num_base_weights(plain)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".experts." in n and p.dtype == torch.uint8)


@pytest.mark.parametrize("options", [{"bnb_4bit_use_double_quant": True}, {"bnb_4bit_quant_type": "fp4"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kinds_of_packing_and_dtypes(folders, dtype, options):
    model = load(folders("qwen3_moe"), dtype, **options)
    skip = model.hf_quantizer.modules_to_not_convert
    assert torch.equal(logits(model), logits(packed_afterwards(folders("qwen3_moe"), skip, dtype, **options)))
    assert model.model.layers[0].mlp.experts.down_proj.dtype == dtype


def test_storage_of_one_dtype_for_sharding(folders):
    model = load(folders("olmoe"), torch.bfloat16, bnb_4bit_quant_storage=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(model), logits(load(folders("olmoe"), torch.bfloat16)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_copies_and_adapters_have_the_dtype_of_the_model_whatever_the_storage(folders, dtype, storage):
    base = load(folders("olmoe"), dtype, bnb_4bit_quant_storage=storage)
    expected = base.model.layers[1].mlp.experts.down_proj[[1, 2]]
    model = get_peft_model(base, ADAPTERS["esft"], autocast_adapter_dtype=False)
    copies = model.get_parameter("base_model.model.model.layers.1.mlp.experts.esft_experts.default.down_proj")
    assert copies.dtype == dtype and torch.equal(copies, expected)
    base = load(folders("olmoe"), dtype, bnb_4bit_quant_storage=storage)
    model = get_peft_model(base, ADAPTERS["perft-e"], autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}


@pytest.mark.parametrize("model_type", ["gemma4_text", "jetmoe", "dbrx"])
def test_routers_that_are_linear_layers_are_packed_by_stock_loading_alone(folders, model_type):
    stock = AutoModelForCausalLM.from_pretrained(
        folders(model_type), quantization_config=BitsAndBytesConfig(load_in_4bit=True, **NF4)
    )
    packed = {n for n, m in stock.named_modules() if type(m) is bitsandbytes.nn.Linear4bit}
    ours = {n for n, m in load(folders(model_type)).named_modules() if type(m) is bitsandbytes.nn.Linear4bit}
    assert packed - ours and all("router" in name for name in packed - ours) and not ours - packed


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_experts_implementations_agree(folders, implementation):
    model = load(folders("olmoe"))
    expected = logits(model)
    model.set_experts_implementation(implementation)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_train_on_a_packed_model_and_come_back(folders, tmp_path, adapter, checkpointing):
    base, batch = load(folders("olmoe")), padded_batch([9, 6, 9])
    expected = logits(base)
    model = get_peft_model(base, ADAPTERS[adapter])
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6 if adapter in ("esft", "mov") else 0)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    losses = train(model, batch)
    assert losses[-1] < losses[0]
    assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())
    assert nothing_is_kept(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(folders("olmoe")), tmp_path)
    torch.testing.assert_close(logits(again.train()), logits(model), rtol=0, atol=0)


def test_selection_and_description_are_those_of_the_plain_model(folders):
    plain, packed = AutoModelForCausalLM.from_pretrained(folders("olmoe")), load(folders("olmoe"))
    for config in ADAPTERS.values():
        assert describe(packed, config).parameters == describe(plain, config).parameters


def test_experts_of_a_packed_model_are_scored(tmp_path):
    tiny_model("olmoe", hidden_size=64).save_pretrained(tmp_path)
    scores = score_experts(load(tmp_path), [padded_batch([7, 5])], show_progress=False)
    assert scores.num_tokens == 12 and scores.top_k == {0: 2, 1: 2}


def test_experts_that_the_checkpoint_lacks_are_packed_too(folders, tmp_path):
    folder = folders("olmoe")
    tiny_model("olmoe").save_pretrained(tmp_path)
    state = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in state.items() if "layers.1.mlp.experts" not in k},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    model = load(tmp_path)
    assert {p.dtype for n, p in model.named_parameters() if "mlp.experts" in n} == {torch.uint8}
    assert model.model.layers[1].mlp.experts.down_proj.std() > 0
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("change", ["narrower", "more experts"])
def test_experts_of_another_shape_are_refused_or_initialized_as_by_stock_loading(folders, tmp_path, change):
    folder = folders("olmoe")
    tiny_model("olmoe").save_pretrained(tmp_path)
    state = load_file(folder / "model.safetensors")
    prefix = "model.layers.1.mlp.experts."
    for key in [key for key in state if key.startswith(prefix) and "down_proj" in key]:
        if change == "narrower":
            state[key] = state[key][:, :-2].contiguous()
        elif key.startswith(f"{prefix}0."):
            state[key.replace(f"{prefix}0.", f"{prefix}6.")] = state[key].clone()
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(tmp_path)
    config = MoeBitsAndBytesConfig(**NF4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, ignore_mismatched_sizes=True)
    own, expected = model.model.layers[1].mlp.experts, load(folder).model.layers[1].mlp.experts
    assert own.down_proj.shape == expected.down_proj.shape and torch.equal(own.gate_up_proj, expected.gate_up_proj)
    assert {p.dtype for p in own.parameters()} == {torch.uint8}
    assert logits(model.train()).isfinite().all()


def test_modules_that_are_skipped_stay_unpacked(folders):
    model = load(folders("olmoe"), llm_int8_skip_modules=["lm_head", "model.layers.1"])
    kinds = [{p.dtype for p in layer.parameters()} for layer in model.model.layers]
    assert kinds == [{torch.float32, torch.uint8}, {torch.float32}]


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_shared_experts_train_where_they_are_not_packed_and_are_refused_elsewhere(folders, storage):
    config = EsftConfig(experts={"0": [0], "1": [1]}, train_shared_experts=True, train_router=True)
    model = load(folders("deepseek_v3"), bnb_4bit_quant_storage=storage)
    with pytest.raises(
        ValueError, match=r"mlp.shared_experts \(.*is quantized.*skip_modules=\['lm_head', '(.*)'\]"
    ) as e:
        get_peft_model(model, config)
    assert logits(model).isfinite().all()
    skip = ["lm_head", re.search(r"'lm_head', '(.*)'", str(e.value))[1]]
    model = get_peft_model(load(folders("deepseek_v3"), llm_int8_skip_modules=skip), config)
    losses = train(model, padded_batch([9, 6, 9]))
    assert losses[-1] < losses[0]


def test_unpacking_gives_a_plain_model(folders):
    model = load(folders("qwen3_moe"))
    before = logits(model)
    model.dequantize()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    assert not model.is_loaded_in_4bit
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapter", ["perft-r", "perft-e", "esft"])
def test_the_model_under_an_adapter_is_unpacked_too(folders, adapter):
    model = get_peft_model(load(folders("qwen3_moe")), ADAPTERS[adapter])
    train(model, padded_batch([9, 6, 9]))
    before = logits(model)
    model.dequantize()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    if adapter == "esft":
        torch.testing.assert_close(logits(model.merge_and_unload()), before, rtol=1e-4, atol=1e-5)


def test_a_dense_model_is_loaded_as_by_stock_loading(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.hf_quantizer.expert_bytes == {}
    assert torch.equal(logits(model), logits(packed_afterwards(tmp_path, None)))


def test_trainers_see_a_bitsandbytes_model_that_is_not_saved_whole(folders, tmp_path):
    model = load(folders("olmoe"))
    assert model.quantization_method == "bitsandbytes" and model.is_loaded_in_4bit
    with pytest.raises(ValueError, match="cannot cast a bitsandbytes model"):
        model.to(torch.float16)
    with pytest.raises(ValueError, match="bitsandbytes_moe and is not serializable"):
        model.save_pretrained(tmp_path)


def test_a_configuration_comes_back_from_its_dict(folders):
    config = MoeBitsAndBytesConfig(**NF4, bnb_4bit_use_double_quant=True)
    values = json.loads(json.dumps(config.to_dict()))
    for again in (MoeBitsAndBytesConfig.from_dict(values), AutoQuantizationConfig.from_dict(values)):
        assert type(again) is MoeBitsAndBytesConfig and again.load_in_4bit
        assert again.to_dict() == config.to_dict()
    model = AutoModelForCausalLM.from_pretrained(folders("olmoe"), quantization_config=values)
    assert model.hf_quantizer.quantized_bytes


def test_the_package_can_be_imported_again():
    code = (
        "import sys, moe_peft, transformers.quantizers.auto as auto\n"
        "assert 'moe_peft.quantization.loading' not in sys.modules\n"
        "first = moe_peft.MoeBitsAndBytesConfig\n"
        "for name in [name for name in sys.modules if name.split('.')[0] == 'moe_peft']: del sys.modules[name]\n"
        "import moe_peft\n"
        "assert moe_peft.MoeBitsAndBytesConfig is not first\n"
        "assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING['bitsandbytes_moe'] is moe_peft.MoeBitsAndBytesConfig"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "asked", [{"load_in_8bit": True, "load_in_4bit": False}, {"load_in_8bit": True}, {"load_in_4bit": False}]
)
def test_experts_are_packed_in_four_bits_only(asked):
    with pytest.raises(ValueError, match=r"quantized to 4 bits only\. Write MoeBitsAndBytesConfig"):
        MoeBitsAndBytesConfig(**asked)
