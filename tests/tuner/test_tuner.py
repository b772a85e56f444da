"""The life of an adapter in stock peft: loading, switching, mixing, merging, and clear refusals."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftMixedModel, PeftModel, get_peft_model
from peft import inject_adapter_in_model as inject
from peft.helpers import check_if_peft_model, rescale_adapter_scale
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file

from moe_peft import LoraMoeConfig, MoePeftWarning, MoloraConfig, MovConfig, RoutedConfig, SiraConfig
from moe_peft.forward.tracker import TRACKER_ATTRIBUTE
from moe_peft.layers import RoutedLayer
from tests.adapter_types import ROUTED_SUMS
from tests.contract.cases import randomize
from tests.tiny import padded_batch, tiny_bert, tiny_llama, tiny_t5


@pytest.fixture
def base():
    return tiny_llama().eval().requires_grad_(False)


@pytest.fixture
def batch():
    return padded_batch([7, 5, 7])


def adapt(base, config_cls=LoraMoeConfig, name="default", **overrides):
    config = config_cls(task_type="CAUSAL_LM", **overrides)
    model = get_peft_model(copy.deepcopy(base), config, adapter_name=name).eval()
    randomize(model)
    return model


@pytest.mark.parametrize("config_cls", ROUTED_SUMS)
def test_state_keys_are_module_prefix_attribute_and_parameter(base, tmp_path, config_cls):
    model = adapt(base, config_cls, target_modules=["down_proj"])
    prefix = model.base_model.prefix
    model.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    stem = "base_model.model.model.layers.{}.mlp.down_proj." + prefix
    endings = ("experts.A", "experts.B", "router.weight")
    assert keys == {stem.format(layer) + ending for layer in range(2) for ending in endings}
    in_model = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".default." in name and ".lora_" not in name and name.count(prefix) == 1 for name in in_model)


def test_auto_classes_and_configuration_load_from_the_folder(base, batch, tmp_path):
    base.save_pretrained(tmp_path / "base")
    reference = type(base).from_pretrained(tmp_path / "base")
    model = adapt(reference, num_experts=3)
    model.save_pretrained(tmp_path / "adapter")
    expected = model(**batch).logits
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert isinstance(config, LoraMoeConfig) and config.num_experts == 3
    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(auto(**batch).logits, expected)
    trainable = PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path / "adapter", is_trainable=True)
    assert sum(p.requires_grad for p in trainable.parameters()) > 0
    frozen = PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path / "adapter")
    assert sum(p.requires_grad for p in frozen.parameters()) == 0


def test_transformers_integration_adds_saves_loads_and_deletes(base, batch, tmp_path):
    expected_base = base(**batch).logits
    model = copy.deepcopy(base)
    model.add_adapter(SiraConfig(r=2, num_experts=4, top_k=2), adapter_name="first")
    randomize(model)
    expected = model(**batch).logits
    assert not torch.allclose(expected, expected_base)
    model.save_pretrained(tmp_path)
    loaded = copy.deepcopy(base)
    loaded.load_adapter(str(tmp_path), adapter_name="again")
    torch.testing.assert_close(loaded(**batch).logits, expected, rtol=0, atol=0)
    loaded.disable_adapters()
    assert torch.equal(loaded(**batch).logits, expected_base)
    loaded.enable_adapters()
    assert torch.equal(loaded(**batch).logits, expected)
    loaded.add_adapter(SiraConfig(r=2, num_experts=2, top_k=1, target_modules=["down_proj"]), adapter_name="second")
    loaded.set_adapter("second")
    assert torch.equal(loaded(**batch).logits, expected_base)
    loaded.delete_adapter("second")
    loaded.set_adapter("again")
    assert torch.equal(loaded(**batch).logits, expected)


def test_transformers_loads_an_adapter_folder_as_a_model(base, batch, tmp_path):
    base.save_pretrained(tmp_path / "base")
    reference = type(base).from_pretrained(tmp_path / "base")
    model = adapt(reference)
    model.save_pretrained(tmp_path / "adapter")
    loaded = type(base).from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_adapters_with_different_targets_live_on_one_model(base, batch):
    model = adapt(base, target_modules=["down_proj"])
    only_first = model(**batch).logits
    model.add_adapter("attention", LoraMoeConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    assert torch.equal(model(**batch).logits, only_first)
    randomize(model, seed=3)
    model.set_adapter("attention")
    attention = model(**batch).logits
    model.set_adapter("default")
    default = model(**batch).logits
    model.base_model.set_adapter(["default", "attention"])
    both = model(**batch).logits
    assert not torch.allclose(both, default) and not torch.allclose(both, attention)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("q_proj" in name for name in trainable) and any("down_proj" in name for name in trainable)


def test_rows_of_a_batch_use_the_adapter_they_name(base, batch):
    model = adapt(base, RoutedConfig)
    model.add_adapter("other", RoutedConfig(task_type="CAUSAL_LM", num_experts=3))
    randomize(model, seed=5)
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = model(**batch).logits
    with model.disable_adapter():
        expected["__base__"] = model(**batch).logits
    names = ["other", "__base__", "default"]
    mixed = model(**batch, adapter_names=names).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], expected[name][row], rtol=1e-5, atol=1e-5)
    inputs = {"input_ids": batch["input_ids"][:, :5], "attention_mask": batch["attention_mask"][:, :5]}
    generated = model.generate(**inputs, adapter_names=names, num_beams=2, max_new_tokens=4, do_sample=False)
    for row, name in enumerate(names):
        alone = model.generate(**inputs, adapter_names=[name] * 3, num_beams=2, max_new_tokens=4, do_sample=False)
        assert torch.equal(generated[row], alone[row][: generated.shape[1]])


def test_rows_of_an_encoder_decoder_use_the_adapter_they_name_under_beam_search():
    base = tiny_t5().eval()
    model = get_peft_model(base, RoutedConfig(task_type="SEQ_2_SEQ_LM", num_experts=3)).eval()
    randomize(model)
    inputs = padded_batch([7, 7])
    mixed = model.generate(**inputs, adapter_names=["__base__", "default"], num_beams=2, max_new_tokens=4)
    alone = model.generate(**inputs, adapter_names=["default"] * 2, num_beams=2, max_new_tokens=4)
    assert torch.equal(mixed[1], alone[1][: mixed.shape[1]])


def test_wrong_adapter_names_are_refused(base, batch):
    model = adapt(base)
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): missing. Known adapters: default"):
        model(**batch, adapter_names=["missing"] * 3)
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same as the number of inputs"):
        model(**batch, adapter_names=["default"])
    with pytest.raises(ValueError, match="training mode"):
        model.train()(**batch, adapter_names=["default"] * 3)


def test_modules_to_save_and_token_indices_train_and_come_back(base, batch, tmp_path):
    model = adapt(base, modules_to_save=["lm_head"], trainable_token_indices=[5, 6])
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert not torch.equal(model.base_model.model.lm_head.modules_to_save["default"].weight, base.lm_head.weight)


def test_classification_head_is_saved_with_the_adapter(tmp_path):
    base = tiny_bert().eval()
    model = get_peft_model(copy.deepcopy(base), LoraMoeConfig(task_type="SEQ_CLS")).eval()
    randomize(model)
    for parameter in model.base_model.model.classifier.modules_to_save.parameters():
        parameter.data.normal_()
    batch = padded_batch([6, 4])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("config_cls", [*ROUTED_SUMS, MovConfig])
def test_one_expert_merges_exactly_and_unmerges(base, batch, config_cls):
    top_k = {"top_k": 1} if config_cls in (SiraConfig, RoutedConfig) else {}
    model = adapt(base, config_cls, num_experts=1, **top_k)
    expected = model(**batch).logits
    model.merge_adapter()
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(module, RoutedLayer) for module in merged.modules())
    assert TRACKER_ATTRIBUTE not in merged.__dict__
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
def test_merging_several_experts_is_refused_before_anything_changes(base, batch, method):
    model = adapt(base)
    model.add_adapter("single", LoraMoeConfig(task_type="CAUSAL_LM", num_experts=1))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"depends on the input of .*merge exactly with num_experts=1"):
        getattr(model, method)()
    with pytest.raises(ValueError, match="'default'"):
        getattr(model, method)(adapter_names=["single", "default"])
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert any(isinstance(module, RoutedLayer) for module in model.modules())


def test_an_adapter_merges_by_name_while_one_that_cannot_is_active(base, batch):
    model = adapt(base)
    model.add_adapter("single", LoraMoeConfig(task_type="CAUSAL_LM", num_experts=1))
    randomize(model)
    model.set_adapter("single")
    expected = model(**batch).logits
    model.set_adapter("default")
    model.merge_adapter(["single"])
    model.unmerge_adapter()
    merged = model.merge_and_unload(adapter_names=["single"])
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-4)


def test_peft_tools_for_plain_lora_are_refused_with_a_reason(base, tmp_path):
    model = adapt(base)
    with pytest.raises(ValueError, match=r"set_adapter\(\[...\]\)"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.raises(ValueError, match="LoraLayer"), rescale_adapter_scale(model, 0.5):
        pass
    with pytest.raises(ValueError, match="LORAMOE"):
        PeftMixedModel(copy.deepcopy(base), LoraMoeConfig(target_modules=["down_proj"]), adapter_name="default")
    model.save_pretrained(tmp_path)
    assert check_if_peft_model(str(tmp_path))
    with pytest.raises(ValueError, match=r"Hotswapping only works for LoRA|LORAMOE|LoRA"):
        hotswap_adapter(model, str(tmp_path), adapter_name="default")


def test_injection_and_state_dict_functions_round_trip(base, batch):
    config = MoloraConfig(num_experts=3)
    model = inject(config, copy.deepcopy(base))
    randomize(model)
    expected = model.eval()(**batch).logits
    state = get_peft_model_state_dict(model)
    twin = inject(MoloraConfig(num_experts=3), copy.deepcopy(base), adapter_name="twin").eval()
    result = set_peft_model_state_dict(twin, state, adapter_name="twin")
    assert not result.unexpected_keys
    assert torch.equal(twin(**batch).logits, expected)


def test_injection_from_a_state_dict_wraps_the_same_places(base, batch):
    model = adapt(base, target_modules=["down_proj", "q_proj"])
    state = get_peft_model_state_dict(model)
    config = LoraMoeConfig(target_modules=["down_proj", "q_proj"])
    state = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    twin = inject(config, copy.deepcopy(base), state_dict=state)
    places = {layer.place for layer in twin.modules() if isinstance(layer, RoutedLayer)}
    assert places == {layer.place for layer in model.modules() if isinstance(layer, RoutedLayer)}


def test_stock_lora_beside_ours_saves_and_loads_cleanly(base, batch, tmp_path):
    """`molora_` contains `lora_`, which a match by substring would confuse."""
    model = copy.deepcopy(base)
    model.add_adapter(MoloraConfig(target_modules=["down_proj"]), adapter_name="ours")
    model.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), adapter_name="stock")
    randomize(model)
    for name, config, own in (("ours", MoloraConfig, "molora_"), ("stock", LoraConfig, ".lora_")):
        model.set_adapter(name)
        expected = model(**batch).logits
        model.save_pretrained(tmp_path / name)
        keys = set(load_file(tmp_path / name / "adapter_model.safetensors"))
        assert keys and all(own in key for key in keys)
        assert isinstance(PeftConfig.from_pretrained(tmp_path / name), config)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name).eval()
        torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-6, atol=1e-6)


def test_adapter_attached_to_the_parts_of_two_types_wraps_around(base, batch):
    model = copy.deepcopy(base)
    model.add_adapter(MoloraConfig(target_modules=["down_proj"]), adapter_name="inner")
    with pytest.warns(
        MoePeftWarning, match=r"down_proj \(and 1 more\) has an adapter of another type.*Save it before"
    ):
        model.add_adapter(SiraConfig(target_modules=["down_proj"]), adapter_name="outer")
    randomize(model)
    places = [layer for layer in model.modules() if isinstance(layer, RoutedLayer)]
    assert {layer.prefix for layer in places} == {"molora_", "sira_"}
    assert torch.isfinite(model(**batch).logits).all()


def test_trl_reference_copy_finds_every_tensor(base, batch):
    """TRL copies parameters whose name contains `.default.` to the adapter `ref`; nothing else may matter."""
    model = adapt(base, SiraConfig)
    model.add_adapter("ref", copy.deepcopy(model.peft_config["default"]))
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    expected = model(**batch).logits
    model.set_adapter("ref")
    assert torch.equal(model(**batch).logits, expected)


def test_status_and_compilation_work(base, batch):
    model = adapt(base)
    status = model.get_model_status()
    assert status.peft_types == {"default": "LORAMOE"} and status.enabled is True
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits)


def test_loading_without_the_import_stops_and_the_card_says_what_to_import(base, tmp_path):
    adapt(base).save_pretrained(tmp_path)
    code = "import sys; from peft import PeftConfig; PeftConfig.from_pretrained(sys.argv[1])"
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode != 0 and "KeyError: 'LORAMOE'" in result.stderr
    card = (tmp_path / "README.md").read_text()
    assert "```python\nimport moe_peft\n" in card and "library_name: peft" in card and "arXiv 2312.09979" in card


@pytest.mark.parametrize("places", [(None, [1], [0]), ([0], None, [1]), ([1], [0], [0])])
def test_one_adapter_takes_over_everywhere_from_a_deleted_one(base, batch, places):
    model = adapt(base, name="a", layers_to_transform=places[0])
    for name, layers in zip("bc", places[1:], strict=True):
        model.add_adapter(name, LoraMoeConfig(task_type="CAUSAL_LM", init_weights=False, layers_to_transform=layers))
    model.set_adapter("b")
    expected = model(**batch).logits
    model.set_adapter("a")
    with pytest.warns(UserWarning, match="active which is now deleted"):
        model.delete_adapter("a")
    assert model.active_adapters == ["b"]
    assert {tuple(layer.active_adapters) for layer in model.modules() if isinstance(layer, RoutedLayer)} == {("b",)}
    assert torch.equal(model(**batch).logits, expected)
    trained = {name.split(".")[-2] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"b"}


def test_one_adapter_takes_over_everywhere_in_a_model_of_transformers(base, batch):
    for name, layers in (("a", None), ("b", [1]), ("c", [0])):
        config = LoraMoeConfig(init_weights=False, layers_to_transform=layers)
        base.add_adapter(config, adapter_name=name)
    base.set_adapter("b")
    expected = base(**batch).logits
    base.set_adapter("a")
    for model in (copy.deepcopy(base), base):
        with pytest.warns(UserWarning, match="active which is now deleted"):
            model.delete_adapter("a")
        assert model.active_adapters() == ["b"]
        assert torch.equal(model(**batch).logits, expected)


def test_deleting_an_adapter_keeps_the_other_active_ones(base, batch):
    model = adapt(base, name="a", layers_to_transform=[0])
    for name in "bc":
        model.add_adapter(name, LoraMoeConfig(task_type="CAUSAL_LM", init_weights=False))
    model.base_model.set_adapter(["b", "c"])
    expected = model(**batch).logits
    model.set_adapter("b")
    model.base_model.set_adapter(["b", "a", "c"])
    model.delete_adapter("a")
    assert model.active_adapters == ["b", "c"]
    assert torch.equal(model(**batch).logits, expected)


def test_adapter_is_injected_into_a_compiled_model_after_its_saved_tensors(base):
    config = LoraMoeConfig(layers_to_transform=[1])
    saved = get_peft_model_state_dict(inject(config, copy.deepcopy(base)))
    model = inject(LoraMoeConfig(layers_to_transform=[1]), torch.compile(copy.deepcopy(base)), state_dict=saved)
    found = {name.removeprefix("_orig_mod.") for name in get_peft_model_state_dict(model)}
    assert found == saved.keys()
