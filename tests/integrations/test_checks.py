"""What a trainer would train nothing with, or only half, is refused before anything of it is changed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from accelerate import DistributedType
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from moe_peft import EsftConfig, MoeCallback, MovConfig, RoutedConfig, attach
from moe_peft.integrations.checks import check_adapter, check_sharded_dtypes, is_count, is_number
from tests.contract.cases import tiny_olmoe
from tests.integrations.test_callback import rows
from tests.tiny import tiny_llama

CASES = {
    "routed": (tiny_llama, lambda: RoutedConfig(num_experts=2, r=2)),
    "mov": (tiny_llama, lambda: MovConfig(num_experts=2)),
    "esft": (tiny_olmoe, lambda: EsftConfig(experts={"0": [1]})),
}


def trainer_of(folder, model, **fields):
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        **fields,
    )
    data = Dataset.from_list([{k: v for k, v in row.items() if k != "task_type"} for row in rows(8)])
    return Trainer(model=model, args=args, train_dataset=data)


def state_of(trainer):
    own = {name: value for name, value in vars(trainer).items() if name in ("train", "log", "data_collator")}
    return own, list(trainer.callback_handler.callbacks), trainer.args.remove_unused_columns


@pytest.mark.parametrize("name", CASES)
def test_a_frozen_adapter_is_refused_and_is_trainable_named(name, tmp_path):
    build, config = CASES[name]
    get_peft_model(build(), config()).save_pretrained(tmp_path / "adapter")
    frozen = trainer_of(tmp_path, PeftModel.from_pretrained(build(), tmp_path / "adapter"))
    before = state_of(frozen)
    with pytest.raises(ValueError, match=r"the adapter is frozen.*is_trainable=True"):
        attach(frozen)
    assert state_of(frozen) == before
    frozen.add_callback(MoeCallback())
    with pytest.raises(ValueError, match="is_trainable=True"):
        frozen.train()
    model = PeftModel.from_pretrained(build(), tmp_path / "adapter", is_trainable=True)
    attach(trainer_of(tmp_path, model)).train()


def test_disabled_and_merged_adapters_are_refused():
    model = get_peft_model(tiny_llama(), RoutedConfig(num_experts=1, router="dense", router_aux_loss_coef=0.0))
    check_adapter(model)
    model.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match="the adapter is frozen"):
        check_adapter(model)
    model.base_model.enable_adapter_layers()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"the adapter 'default' is merged .*unmerge_adapter"):
        check_adapter(model)


BAD_COUNTS = [-1, 1.5, float("nan"), True, "2", None, [1]]


@pytest.mark.parametrize("value", BAD_COUNTS)
@pytest.mark.parametrize("name", ["telemetry_steps", "layer_groups"])
def test_arguments_that_are_no_whole_numbers_are_refused_before_anything_changes(name, value, tmp_path):
    trainer = trainer_of(tmp_path, get_peft_model(tiny_llama(), RoutedConfig(num_experts=2, r=2)))
    before = state_of(trainer)
    with pytest.raises(ValueError, match=f"attach: {name}="):
        attach(trainer, **{name: value})
    with pytest.raises(ValueError, match=f"MoeCallback: {name}="):
        MoeCallback(**{name: value})
    assert state_of(trainer) == before


def test_messages_cut_long_values():
    with pytest.raises(ValueError) as error:
        MoeCallback(telemetry_steps="9" * 10_000)
    assert len(str(error.value)) < 400


def test_what_counts_as_a_number():
    assert is_count(0) and is_count(3) and is_number(2) and is_number(0.5)
    assert not any(is_count(value) for value in BAD_COUNTS)
    assert not any(is_number(value) for value in ("1", True, None, float("nan"), float("inf"), 1j, 10**400))


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("train_router", [False, True])
def test_trained_parameters_of_two_dtypes_in_a_layer_are_refused_before_fsdp_would(train_router, precision):
    model = get_peft_model(tiny_olmoe().bfloat16(), EsftConfig(experts={"0": [1]}, train_router=train_router))
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, mixed_precision=precision)
    trainer = SimpleNamespace(model=model, accelerator=accelerator)
    if train_router and precision == "no":
        with pytest.raises(ValueError, match=r"one dtype in a layer, but .*layers\.0\..* is torch\..*Set bf16=True"):
            check_sharded_dtypes(trainer)
    else:
        check_sharded_dtypes(trainer)
    accelerator.distributed_type = DistributedType.MULTI_GPU
    check_sharded_dtypes(trainer)
