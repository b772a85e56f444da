"""Adapters are saved whole, under names without wrappers, or not at all."""

from __future__ import annotations

import json
import sys
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from moe_peft import EsftConfig, MovConfig, PerftConfig, RoutedConfig
from moe_peft.tuner.saving import check_whole, unwrapped
from tests.contract.cases import tiny_olmoe
from tests.processes.together import run_together
from tests.tiny import tiny_llama
from tests.tuner.ways import adapted, logits

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SMALL = {"task_type": "CAUSAL_LM", "num_experts": 3, "r": 2}
CASES = {
    "linear": (tiny_llama, RoutedConfig(**SMALL, modules_to_save=["input_layernorm"], trainable_token_indices=[3])),
    "scaled": (tiny_llama, MovConfig(task_type="CAUSAL_LM", num_experts=2)),
    "block": (tiny_olmoe, PerftConfig(**SMALL)),
    "slices": (tiny_olmoe, EsftConfig(task_type="CAUSAL_LM", experts={"0": [1], "1": [2]}, train_router=True)),
}


def compiled(layer: nn.Module) -> nn.Module:
    return torch.compile(layer, backend="eager")


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, compiled, lambda layer: compiled(checkpoint_wrapper(layer))])
@pytest.mark.parametrize("case", CASES)
def test_wrappers_around_modules_leave_no_trace_in_the_file(case, wrap, tmp_path):
    build, config = CASES[case]
    model = adapted(build(), config)
    expected = logits(model)
    model.save_pretrained(tmp_path / "plain")
    layers = model.base_model.model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = wrap(layer)
    model.save_pretrained(tmp_path / "wrapped")
    model.save_pretrained(tmp_path / "given", state_dict=unwrapped(model.state_dict()))
    plain = load_file(tmp_path / "plain" / WEIGHTS)
    for folder in ("wrapped", "given"):
        found = load_file(tmp_path / folder / WEIGHTS)
        assert found.keys() == plain.keys() and all(torch.equal(tensor, found[key]) for key, tensor in plain.items())
        assert torch.equal(logits(PeftModel.from_pretrained(build(), tmp_path / folder)), expected)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default." in name and "modules_to_save" not in name and "token" not in name:
                parameter.zero_()
    if "modules_to_save" not in json.dumps([key for key, _ in model.named_parameters()]):
        model.load_adapter(tmp_path / "plain", adapter_name="default")
        torch.testing.assert_close(logits(model), expected)  # compiled layers round in an order of their own


def test_a_state_dict_of_a_data_parallel_wrapper_is_saved_under_plain_names(tmp_path):
    model = adapted(tiny_llama(), RoutedConfig(**SMALL))
    model.save_pretrained(tmp_path, state_dict={f"module.{key}": value for key, value in model.state_dict().items()})
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(model))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("loss", ["nothing", "half", "a shape"])
def test_a_state_dict_without_the_whole_adapter_is_refused_and_the_file_before_it_stays(case, loss, tmp_path):
    build, config = CASES[case]
    model = adapted(build(), config)
    model.save_pretrained(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in (WEIGHTS, CONFIG)}
    tensors = model.state_dict()
    own = [key for key in tensors if ".default." in key and f".{config.adapter_type.lower()}_" in key]
    for key in own if loss == "nothing" else own[:1]:
        tensors[key] = tensors[key][:0]
        if loss != "a shape":
            del tensors[key]
    with pytest.raises(ValueError, match=r"Saving the adapter 'default' would lose \d+ of its \d+ tensors, the first"):
        model.save_pretrained(tmp_path, state_dict=tensors)
    assert before == {name: (tmp_path / name).read_bytes() for name in (WEIGHTS, CONFIG)}


@pytest.mark.parametrize("part", ["experts.A", "router.weight"])
def test_parametrized_parts_are_refused_before_a_file_is_written_and_saved_without(part, tmp_path):
    model = adapted(tiny_llama(), RoutedConfig(**SMALL, target_modules=["up_proj"]))
    attribute, name = part.split(".")
    module = next(own for key, own in model.named_modules() if key.endswith(f".routed_{attribute}.default"))
    adapted(tiny_llama(), RoutedConfig(**SMALL, top_k=1)).save_pretrained(tmp_path)
    before = {file: (tmp_path / file).read_bytes() for file in (WEIGHTS, CONFIG)}
    nn.utils.parametrize.register_parametrization(module, name, nn.Softplus())
    for save in (model.save_pretrained, lambda folder: get_peft_model_state_dict(model)):
        with pytest.raises(ValueError, match=r"parametrizations.*Take parametrizations off.*Nothing has been written"):
            save(tmp_path)
    assert before == {file: (tmp_path / file).read_bytes() for file in (WEIGHTS, CONFIG)}
    nn.utils.parametrize.remove_parametrizations(module, name)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), expected)


def test_parameters_that_are_split_are_not_saved_in_parts():
    model = adapted(tiny_llama(), RoutedConfig(**SMALL))
    parameter = next(p for name, p in model.named_parameters() if ".default." in name)
    parameter.ds_shape = torch.Size([7, 7])
    with pytest.raises(ValueError, match=r"is split over processes.*get_state_dict.*Nothing has been written"):
        check_whole(model, "default", None)
    check_whole(model, "default", {})


def test_an_adapter_saved_over_one_of_another_meaning_is_never_misread(tmp_path, monkeypatch):
    first = adapted(tiny_llama(), RoutedConfig(**SMALL, lora_alpha=4))
    first.save_pretrained(tmp_path)
    import peft.peft_model

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    second = adapted(tiny_llama(), RoutedConfig(**SMALL, lora_alpha=8), seed=2)
    with monkeypatch.context() as patched:
        patched.setattr(peft.peft_model, "safe_save_file", stop)
        with pytest.raises(KeyboardInterrupt):
            second.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lora_alpha=4.* has lora_alpha=8"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)
    second.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(second))


def test_stacked_adapters_are_saved_apart(tmp_path):
    model = adapted(tiny_llama(), RoutedConfig(**SMALL), name="a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter("b", RoutedConfig(**SMALL, target_modules=["up_proj"]))
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "a" / WEIGHTS)) == 3 * len(load_file(tmp_path / "b" / WEIGHTS))


@pytest.mark.parametrize("again", [{"target_modules": ["up_proj"]}, {"layers_to_transform": [0]}, {"wraps": "block"}])
def test_adapting_a_model_again_with_fewer_places_is_refused_at_once(again, tmp_path):
    base = tiny_llama()
    model = get_peft_model(base, RoutedConfig(**SMALL))
    before = [(name, type(module)) for name, module in base.named_modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(
            ValueError, match=r"has an adapter 'default' already, at .*unload\(\)|adapters of their own"
        ):
            get_peft_model(base, RoutedConfig(**SMALL, **again))
        assert before == [(name, type(module)) for name, module in base.named_modules()]
        model.save_pretrained(tmp_path)
        PeftModel.from_pretrained(tiny_llama(), tmp_path)
        same = get_peft_model(base, RoutedConfig(**SMALL))
    same.save_pretrained(tmp_path)
    PeftModel.from_pretrained(tiny_llama(), tmp_path)


@pytest.mark.multi_process
def test_sharded_training_with_activation_checkpointing_saves_the_whole_adapter(tmp_path):
    run_together(
        [[sys.executable, "-m", "tests.processes.saving_worker", str(rank), "2", str(tmp_path)] for rank in range(2)]
    )
    for case, (build, config) in CASES.items():
        single = adapted(build(), config)
        found, expected = load_file(tmp_path / case / WEIGHTS), logits(single)
        single.save_pretrained(tmp_path / "single" / case)
        assert found.keys() == load_file(tmp_path / "single" / case / WEIGHTS).keys()
        assert torch.equal(logits(PeftModel.from_pretrained(build(), tmp_path / case)), expected)
