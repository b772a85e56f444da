"""Weights are resumed with the settings that gave them their meaning, whoever reads them, or not at all."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from moe_peft import EsftConfig, LoraMoeConfig, MovConfig, RoutedConfig, attach
from moe_peft.integrations.resuming import check_finite_weights, check_resumed, write_missing_configs
from moe_peft.layers import routed_layers
from tests.contract.cases import randomize, tiny_olmoe
from tests.integrations.test_training_run import trainer_of
from tests.tiny import tiny_llama

SMALL = {"task_type": "CAUSAL_LM", "num_experts": 3, "r": 2}
# What the checkpoint was trained with, and what the run that resumes has instead; tensors fit in all cases.
CHANGES = {
    "lora_alpha": (RoutedConfig(**SMALL, lora_alpha=4), RoutedConfig(**SMALL, lora_alpha=16)),
    "top_k": (RoutedConfig(**SMALL, top_k=2), RoutedConfig(**SMALL, top_k=1)),
    "norm_topk_prob": (RoutedConfig(**SMALL), RoutedConfig(**SMALL, norm_topk_prob=True)),
    "capacity_factor": (
        RoutedConfig(**SMALL, router="capacity", capacity_factor=2.0),
        RoutedConfig(**SMALL, router="capacity", capacity_factor=1.0),
    ),
    "activation": (
        RoutedConfig(**SMALL, experts="bottleneck", activation="relu"),
        RoutedConfig(**SMALL, experts="bottleneck", activation="gelu"),
    ),
    "router": (RoutedConfig(**SMALL), RoutedConfig(**SMALL, router="dense")),
    "adapter_type": (LoraMoeConfig(**SMALL), RoutedConfig(**SMALL, router="dense", target_modules=["up_proj"])),
}
HOW = ["plain", "attach", "plain, model_init", "attach, model_init"]


def model_of(config, name="default", base=tiny_llama):
    return get_peft_model(base(), copy.deepcopy(config), name)


def checkpoint_of(config, folder, name="default"):
    model = model_of(config, name)
    randomize(model)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("field", CHANGES)
@pytest.mark.parametrize("how", HOW)
def test_a_trainer_does_not_resume_with_other_settings(field, how, tmp_path):
    its, own = CHANGES[field]
    checkpoint = checkpoint_of(its, tmp_path / "checkpoint-1")
    made = []

    def make():
        made.append(model_of(own))
        return made[-1]

    trainer = trainer_of(tmp_path, make if "model_init" in how else make())
    trainer = attach(trainer) if "attach" in how else trainer
    before = {name: tensor.clone() for name, tensor in made[0].state_dict().items()}
    # Weights of another type lack tensors, which peft's own way of loading says first.
    message = f"{field}=.*{field}=" if field != "adapter_type" or "attach" in how else f"{field}=|lack"
    with pytest.raises(ValueError, match=message) as refused:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    if field != "adapter_type":
        assert f"{field}={getattr(its, field)!r}" in str(refused.value)
        assert f"{field}={getattr(own, field)!r}" in str(refused.value)
    assert trainer.state.global_step == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in made[0].state_dict().items())


@pytest.mark.parametrize("field", [field for field in CHANGES if field != "adapter_type"])
@pytest.mark.parametrize("name", ["default", "mine"])
def test_states_of_fsdp_and_deepspeed_are_compared_by_the_configuration_beside_them(field, name, tmp_path):
    its, own = CHANGES[field]
    (tmp_path / "pytorch_model_fsdp_0").mkdir()
    model = model_of(its, name)
    write_missing_configs(model, tmp_path)
    assert [path.name for path in tmp_path.rglob("*.json")] == ["adapter_config.json"]
    assert not model.peft_config[name].inference_mode
    check_resumed(model, tmp_path)
    with pytest.raises(ValueError, match=rf"adapter_config.json holds weights of .*{field}=.* has .*{field}="):
        check_resumed(model_of(own, name), tmp_path)


def test_the_weights_own_word_counts_before_that_of_an_edited_configuration(tmp_path):
    its, own = CHANGES["lora_alpha"]
    checkpoint_of(its, tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**fields, "lora_alpha": own.lora_alpha}))
    with pytest.raises(ValueError, match=r"adapter_model.safetensors holds weights of lora_alpha=4, but"):
        check_resumed(model_of(own), tmp_path)
    with pytest.raises(ValueError, match=r"adapter_config.json holds weights of lora_alpha=16, but"):
        check_resumed(model_of(its), tmp_path)


def test_each_of_several_adapters_is_compared_with_its_own(tmp_path):
    its, own = CHANGES["lora_alpha"]
    model = model_of(its)
    model.add_adapter("second", copy.deepcopy(own))
    model.save_pretrained(tmp_path)
    check_resumed(model, tmp_path)
    other = model_of(its)
    other.add_adapter("second", copy.deepcopy(its))
    with pytest.raises(ValueError, match=r"second.*lora_alpha=16, but the adapter 'second'"):
        check_resumed(other, tmp_path)


def test_selected_experts_are_compared_too(tmp_path):
    one, other = (EsftConfig(task_type="CAUSAL_LM", experts={"1": experts}) for experts in ([1, 3], [0, 3]))
    write_missing_configs(model_of(one, base=tiny_olmoe), tmp_path)
    with pytest.raises(ValueError, match=r"experts=.*\[1, 3\].*experts=.*\[0, 3\]"):
        check_resumed(model_of(other, base=tiny_olmoe), tmp_path)


def test_a_checkpoint_of_another_package_and_one_that_says_nothing(tmp_path):
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="is of an adapter type of another package, but the adapter 'default'"):
        check_resumed(model_of(CHANGES["top_k"][0]), tmp_path / "lora")
    check_resumed(model_of(CHANGES["top_k"][0]), tmp_path)
    check_resumed(get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])), tmp_path / "lora")


@pytest.mark.parametrize("config", [RoutedConfig(**SMALL), MovConfig(num_experts=2, target_modules=["k_proj"])])
def test_a_run_does_not_go_on_from_values_that_are_not_finite(config, tmp_path):
    model = model_of(config)
    check_finite_weights(model, tmp_path)
    for bank, value in (("experts", float("nan")), ("router", float("inf"))):
        layer = routed_layers(model)[-1]
        parameter = next(getattr(layer, bank).parameters())
        with torch.no_grad():
            before = parameter.view(-1)[0].item()
            parameter.view(-1)[0] = value
        with pytest.raises(ValueError, match=rf"in 1 tensors: \['.*{re.escape(layer.place)}.default\."):
            check_finite_weights(model, tmp_path)
        with torch.no_grad():
            parameter.view(-1)[0] = before


def test_training_writes_the_configuration_that_a_checkpoint_lacks_and_no_other(tmp_path):
    trainer = attach(
        trainer_of(tmp_path, model_of(CHANGES["top_k"][0]), save_strategy="steps", save_steps=1, max_steps=1)
    )
    trainer.save_model = lambda folder, **kwargs: Path(folder).mkdir(
        exist_ok=True
    )  # no weights, as with sharded states
    trainer.train()
    assert (tmp_path / "checkpoint-1" / "adapter_config.json").is_file()
    assert not (tmp_path / "checkpoint-1" / "adapter_model.safetensors").exists()
    check_resumed(trainer.model, tmp_path / "checkpoint-1")
