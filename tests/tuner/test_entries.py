"""Whatever way an adapter comes in, the same checks meet it, and a refusal leaves everything as it was."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moe_peft import EsftConfig, LoraMoeConfig, MovConfig, PerftConfig, RoutedConfig, routed_layers
from tests.contract.cases import tiny_olmoe
from tests.slices import diagonal, sliced
from tests.tiny import tiny_llama
from tests.tuner.ways import WAYS, adapted, assert_unchanged, logits, saved, state_of

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SMALL = {"task_type": "CAUSAL_LM", "num_experts": 3, "r": 2}
ROUTED = RoutedConfig(**SMALL)
PREFIX = "base_model.model."


def edited(folder, change):
    """Change the tensors of a folder's file."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def drop_half(tensors):
    for key in [key for key in tensors if "layers.0" in key]:
        del tensors[key]


def add_head(tensors):
    tensors[f"{PREFIX}lm_head.weight"] = torch.zeros(64, 32)


def add_base_layer(tensors):
    tensors[f"{PREFIX}model.layers.0.mlp.gate_proj.base_layer.weight"] = torch.zeros(48, 32)


def add_layer(tensors):
    for key in [key for key in tensors if "layers.1" in key]:
        tensors[key.replace("layers.1", "layers.2")] = tensors[key].clone()


def widen(tensors):
    key = sorted(tensors)[0]
    tensors[key] = torch.zeros(*tensors[key].shape[:-1], tensors[key].shape[-1] + 1)


def break_values(tensors):
    sorted_keys = sorted(tensors)
    tensors[sorted_keys[0]].view(-1)[0] = float("nan")
    tensors[sorted_keys[-1]].view(-1)[0] = float("inf")


def round_values(tensors):
    key = sorted(tensors)[0]
    tensors[key] = tensors[key].long()


def complex_values(tensors):
    key = next(iter(tensors))
    tensors[key] = tensors[key].to(torch.complex64)


FAULTS = {
    "half of the tensors": (drop_half, r"lack \d+ of \d+ tensors, the first is .*layers\.0"),
    "another layer": (add_layer, r"hold \d+ tensors more than this model has places for, the first is .*layers\.2"),
    "a base weight": (add_head, r"1 tensors that are not the adapter's, the first is .*lm_head.weight"),
    "a wrapped weight": (add_base_layer, r"1 tensors that are not the adapter's, .*gate_proj.base_layer.weight"),
    "another width": (widen, r"has the shape .* but this model needs"),
    "values that are not finite": (break_values, r"NaN or infinite values in 2 tensors: \['.*'.*\]"),
    "integers": (round_values, r"holds integers or complex numbers in"),
    "complex numbers": (complex_values, r"holds integers or complex numbers in"),
}
FAULTY = [(way, fault) for way in WAYS for fault in FAULTS]


@pytest.mark.parametrize(("way", "fault"), sliced(FAULTY, diagonal(FAULTY, 0, every=2)))
def test_a_file_that_is_not_the_adapters_own_whole_weights_is_refused_and_nothing_changes(way, fault, tmp_path):
    change, message = FAULTS[fault]
    folder = edited(saved(tiny_llama(), ROUTED, tmp_path / "adapter"), change)
    model, load = WAYS[way](tiny_llama().eval(), ROUTED, folder)
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        load()
    assert_unchanged(model, before)


@pytest.mark.parametrize("way", WAYS)
def test_whole_weights_are_taken(way, tmp_path):
    expected = logits(adapted(tiny_llama(), ROUTED))
    model, load = WAYS[way](tiny_llama().eval(), ROUTED, saved(tiny_llama(), ROUTED, tmp_path / "adapter"))
    load()
    if "new name" in way or "second" in way:
        model.set_adapter("new")
    assert torch.allclose(logits(model), expected, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_a_pickle_is_never_read(way, tmp_path, monkeypatch):
    folder = saved(tiny_llama(), ROUTED, tmp_path / "adapter")
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    model, load = WAYS[way](tiny_llama().eval(), ROUTED, folder)
    before = state_of(model)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("a pickle was read"))
    with pytest.raises(ValueError, match="only safetensors are loaded"):
        load()
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["default", "other"])
def test_a_pickle_that_could_not_be_loaded_is_not_written(name, tmp_path):
    model = adapted(tiny_llama(), ROUTED, name=name)
    for keep in ({}, {"selected_adapters": [name]}):
        with pytest.raises(ValueError, match=r"safe_serialization=False would write adapter_model\.bin"):
            model.save_pretrained(tmp_path / "folder", safe_serialization=False, **keep)
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("way", WAYS)
def test_a_truncated_file_is_refused(way, tmp_path):
    folder = saved(tiny_llama(), ROUTED, tmp_path / "adapter")
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-7])
    model, load = WAYS[way](tiny_llama().eval(), ROUTED, folder)
    before = state_of(model)
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load()
    assert_unchanged(model, before)


# Two configurations whose tensors have the same names and shapes, and mean something else.
MEANINGS = {
    "top_k": (tiny_llama, RoutedConfig(**SMALL, top_k=2), RoutedConfig(**SMALL, top_k=1)),
    "lora_alpha": (tiny_llama, RoutedConfig(**SMALL, lora_alpha=4), RoutedConfig(**SMALL, lora_alpha=16)),
    "use_rslora": (tiny_llama, LoraMoeConfig(**SMALL), LoraMoeConfig(**SMALL, use_rslora=True)),
    "norm_topk_prob": (tiny_llama, RoutedConfig(**SMALL), RoutedConfig(**SMALL, norm_topk_prob=True)),
    "routed_scaling_factor": (tiny_llama, RoutedConfig(**SMALL), RoutedConfig(**SMALL, routed_scaling_factor=2.0)),
    "router": (tiny_llama, RoutedConfig(**SMALL), RoutedConfig(**SMALL, router="capacity", capacity_factor=2.0)),
    "capacity_factor": (
        tiny_llama,
        RoutedConfig(**SMALL, router="capacity", capacity_factor=1.0),
        RoutedConfig(**SMALL, router="capacity", capacity_factor=2.0),
    ),
    "activation": (
        tiny_llama,
        RoutedConfig(**SMALL, experts="bottleneck", activation="relu"),
        RoutedConfig(**SMALL, experts="bottleneck", activation="gelu"),
    ),
    "experts": (
        tiny_olmoe,
        EsftConfig(task_type="CAUSAL_LM", experts={"1": [1, 3]}),
        EsftConfig(task_type="CAUSAL_LM", experts={"1": [0, 3]}),
    ),
    "router_input": (
        tiny_llama,
        MovConfig(task_type="CAUSAL_LM", num_experts=3, router_granularity="token", target_modules=["q_proj"]),
        MovConfig(
            task_type="CAUSAL_LM",
            num_experts=3,
            router_granularity="token",
            target_modules=["q_proj"],
            router_input="hidden",
        ),
    ),
    "variant": (
        tiny_olmoe,
        PerftConfig(task_type="CAUSAL_LM", r=2, variant="D", num_experts=1),
        PerftConfig(task_type="CAUSAL_LM", r=2, variant="S"),
    ),
}


EDITED = [
    (way, field) for way in ("from_pretrained", "load_adapter, new name", "transformers", "hub") for field in MEANINGS
]


@pytest.mark.parametrize("field", MEANINGS)
@pytest.mark.parametrize("way", ["from_pretrained(config=)", "load_adapter, taken name"])
@pytest.mark.parametrize("stamped", [True, False], ids=["", "file of 0.1.0"])
def test_weights_that_mean_something_else_to_a_given_configuration_are_refused(field, way, stamped, tmp_path):
    build, its, own = MEANINGS[field]
    folder = saved(build(), its, tmp_path / "adapter")
    if not stamped:
        edited(folder, lambda tensors: None)
    model, load = WAYS[way](build().eval(), own, folder)
    before = state_of(model)
    with pytest.raises(ValueError, match=f"{field}=.*{field}=") as refused:
        load()
    assert re.search(re.escape(f"{field}={getattr(its, field)!r}"), str(refused.value))
    assert_unchanged(model, before)


@pytest.mark.parametrize(("way", "field"), sliced(EDITED, diagonal(EDITED, 0, every=2)))
def test_an_edited_configuration_is_refused(field, way, tmp_path):
    build, its, own = MEANINGS[field]
    folder = saved(build(), its, tmp_path / "adapter")
    saved(build(), own, tmp_path / "other")
    (folder / CONFIG).write_text((tmp_path / "other" / CONFIG).read_text())
    model, load = WAYS[way](build().eval(), its, folder)
    before = state_of(model)
    with pytest.raises(ValueError, match=rf"{field}=.*{field}="):
        load()
    assert_unchanged(model, before)


BROKEN = ["", "{", "[]", "null", "{}", '{"peft_type": 5}', '{"peft_type": "NOPE"}', '{"peft_type": ["ROUTED"]}']
BROKEN += [
    '{"peft_type": "ROUTED", "num_experts": "three"}',
    '{"peft_type": "ROUTED", "r": NaN}',
    "\ud800",
    "[" * 100_000,
]


UNREADABLE = [(way, text) for way in WAYS for text in BROKEN]


def test_settings_of_training_may_change(tmp_path):
    folder = saved(tiny_llama(), RoutedConfig(**SMALL, router_aux_loss_coef=0.1), tmp_path)
    other = RoutedConfig(**SMALL, router_aux_loss_coef=0.0, router_jitter_noise=0.1, lora_dropout=0.1)
    model = adapted(tiny_llama(), other, seed=2)
    model.load_adapter(folder, adapter_name="default")
    assert torch.equal(logits(model), logits(adapted(tiny_llama(), ROUTED)))


@pytest.mark.parametrize(("way", "text"), sliced(UNREADABLE, diagonal(UNREADABLE, 0, every=4)))
def test_a_broken_configuration_is_refused_in_words(way, text, tmp_path):
    folder = saved(tiny_llama(), ROUTED, tmp_path / "adapter")
    (folder / CONFIG).write_bytes(text.encode("utf-8", "surrogatepass"))
    model, load = WAYS[way](tiny_llama().eval(), ROUTED, folder)
    before = state_of(model)
    with pytest.raises((ValueError, TypeError)) as refused:
        load()
    assert len(str(refused.value)) < 1500 and str(refused.value)
    assert_unchanged(model, before)


# Ways that ask peft for the class by the file's peft_type, and one that knows the class.
def _by_class(folder):
    return RoutedConfig.from_pretrained(folder)


def _by_type(folder):
    return PeftConfig.from_pretrained(folder)


def _auto_model(folder):
    return AutoPeftModelForCausalLM.from_pretrained(folder)


OF_OURS = [
    {"r": 10**30},
    {"r": "x"},
    {"r": 2.5},
    {"r": True},
    {"num_experts": -1},
    {"num_experts": [3]},
    {"target_modules": {"a": 1}},
    {"target_modules": "(a+)+$(("},
    {"lora_alpha": float("inf")},
    {"task_type": 7},
    {"base_model_name_or_path": 5},
    {"schema_version": 99},
]


@pytest.mark.parametrize("load", [_by_class, _by_type, _auto_model])
def test_a_broken_configuration_that_names_one_of_our_types_is_refused_with_the_field(load, tmp_path):
    folder = saved(tiny_llama(), ROUTED, tmp_path)
    fields = json.loads((folder / CONFIG).read_text())
    for change in OF_OURS:
        (folder / CONFIG).write_text(json.dumps({**fields, **change}))
        with pytest.raises((ValueError, TypeError), match=next(iter(change))) as refused:
            load(folder)
        assert len(str(refused.value)) < 1500


def test_a_class_of_ours_refuses_every_file_that_is_no_configuration_of_it(tmp_path):
    folder = saved(tiny_llama(), ROUTED, tmp_path)
    for text in (*BROKEN, '{"peft_type": null}', '{"a":' * 50_000):
        if text != "{}":  # which says nothing wrong
            (folder / CONFIG).write_bytes(text.encode("utf-8", "surrogatepass"))
            with pytest.raises(ValueError, match=r"."):
                _by_class(folder)


@pytest.mark.parametrize("load", [_by_type, _auto_model])
def test_a_configuration_that_names_no_type_of_ours_is_refused_by_peft_itself(load, tmp_path):
    folder = saved(tiny_llama(), ROUTED, tmp_path)
    for text in ("{", "null", '{"peft_type": 5}', '{"peft_type": "NOPE"}', '{"peft_type": null}'):
        (folder / CONFIG).write_text(text)
        with pytest.raises((ValueError, TypeError, KeyError)):
            load(folder)


@pytest.mark.parametrize("way", WAYS)
def test_routed_weights_are_not_taken_for_those_of_another_type(way, tmp_path):
    folder = saved(tiny_llama(), ROUTED, tmp_path / "adapter")
    LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(folder)
    model, load = WAYS[way](tiny_llama().eval(), ROUTED, folder)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"peft_type='LORA', but .* holds weights of adapter_type='ROUTED'"):
        load()
    assert_unchanged(model, before)


@pytest.mark.parametrize("way", ["from_pretrained", "load_adapter, new name", "transformers"])
def test_a_rank_that_no_file_has_is_refused_before_memory_is_asked_for(way, tmp_path):
    config = PerftConfig(task_type="CAUSAL_LM", variant="E", r=2)
    folder = saved(tiny_olmoe(), config, tmp_path / "adapter")
    fields = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**fields, "r": 60_000, "lora_alpha": 120_000}))
    edited(folder, lambda tensors: None)  # a file that does not say what it means
    model, load = WAYS[way](tiny_olmoe().eval(), config, folder)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"but this model needs \(4, 60000, 32\)"):
        load()
    assert_unchanged(model, before)


def test_modules_that_are_saved_with_an_adapter_are_part_of_it(tmp_path):
    config = RoutedConfig(**SMALL, modules_to_save=["norm"], trainable_token_indices=[3, 5])
    folder = saved(tiny_llama(), config, tmp_path / "adapter")
    PeftModel.from_pretrained(tiny_llama(), folder)
    for ending in ("norm.weight", "trainable_tokens_delta"):
        base = tiny_llama().eval()
        broken = saved(tiny_llama(), config, tmp_path / ending)
        edited(broken, lambda tensors, ending=ending: tensors.pop(next(k for k in tensors if k.endswith(ending))))
        before = state_of(base)
        with pytest.raises(ValueError, match="lack"):
            PeftModel.from_pretrained(base, broken)
        assert_unchanged(base, before)


def test_embeddings_that_were_saved_on_purpose_load_again_and_others_do_not(tmp_path):
    model = adapted(tiny_llama(), ROUTED)
    model.get_input_embeddings().weight.data += 1
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert f"{PREFIX}model.embed_tokens.weight" in load_file(tmp_path / WEIGHTS)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(model))
    edited(tmp_path, lambda tensors: None)
    with pytest.raises(ValueError, match=r"not the adapter's, the first is .*(embed_tokens|lm_head)"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


@pytest.mark.parametrize("save", ["peft", "transformers"])
def test_a_saved_file_says_what_it_means(save, tmp_path):
    config = RoutedConfig(**SMALL, top_k=1, lora_alpha=7)
    if save == "peft":
        adapted(tiny_llama(), config).save_pretrained(tmp_path)
    else:
        model = tiny_llama()
        model.add_adapter(config)
        model.save_pretrained(tmp_path)
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    meaning = json.loads(metadata["moe_peft"])
    assert meaning["adapter_type"] == "ROUTED" and meaning["top_k"] == 1 and meaning["lora_alpha"] == 7
    fields = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**fields, "lora_alpha": 8}))
    with pytest.raises(ValueError, match=r"lora_alpha=7.* has lora_alpha=8"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_a_model_that_is_loaded_by_the_name_of_an_adapter_is_checked_too(tmp_path):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, copy.deepcopy(ROUTED)).save_pretrained(tmp_path / "adapter")
    AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    edited(tmp_path / "adapter", drop_half)
    with pytest.raises(ValueError, match=r"lack \d+ of"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")


def test_a_state_dict_given_to_transformers_is_checked_too(tmp_path):
    tensors = load_file(saved(tiny_llama(), ROUTED, tmp_path) / WEIGHTS)
    model = tiny_llama().eval()
    model.load_adapter(adapter_state_dict=dict(tensors), peft_config=copy.deepcopy(ROUTED))
    assert torch.allclose(logits(model), logits(adapted(tiny_llama(), ROUTED)), atol=1e-6)
    for fault in ("half of the tensors", "integers", "values that are not finite"):
        change, message = FAULTS[fault]
        broken, model = {key: tensor.clone() for key, tensor in tensors.items()}, tiny_llama().eval()
        change(broken)
        before = state_of(model)
        with pytest.raises(ValueError, match=message):
            model.load_adapter(adapter_state_dict=broken, peft_config=copy.deepcopy(ROUTED))
        assert_unchanged(model, before)


def test_an_adapter_that_transformers_cannot_activate_is_not_added():
    model = tiny_llama().eval()
    model.add_adapter(RoutedConfig(**SMALL, target_modules=["o_proj"], modules_to_save=["mlp"]), "whole")
    before = state_of(model)
    with pytest.raises(ValueError, match="Adapter second not found"):
        model.add_adapter(RoutedConfig(**SMALL, target_modules=["q_proj"]), "second")
    assert_unchanged(model, before)


@pytest.mark.parametrize("operation", ["set_adapter", "enable_adapters", "disable_adapters", "delete_adapter"])
def test_adapters_of_transformers_are_switched_at_all_places_or_at_none(operation):
    model = tiny_llama().eval()
    for name in ("a", "b"):
        model.add_adapter(RoutedConfig(**SMALL, target_modules=["q_proj"]), name)
    *_, last = routed_layers(model)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    method = "enable_adapters" if operation == "disable_adapters" else operation
    arguments = ("a",) if operation in ("set_adapter", "delete_adapter") else ()
    last.__dict__[method] = interrupted
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        getattr(model, operation)(*arguments)
    assert_unchanged(model, before)


def test_adapters_of_other_packages_pass_as_they_are(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_llama(), config)
    model.save_pretrained(tmp_path / "safe")
    model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    expected = logits(model.eval())
    for folder in ("safe", "pickled"):
        assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / folder)), expected)
        model.load_adapter(tmp_path / folder, adapter_name="default")
    with safe_open(tmp_path / "safe" / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    with pytest.raises(TypeError, match="model_id"):
        PeftModel.from_pretrained(tiny_llama())
