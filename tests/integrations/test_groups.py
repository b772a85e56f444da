"""Sample groups: training needs them, evaluation does not, and what a trainer cannot bring is said by attach."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from moe_peft import LoraMoeConfig, RoutedConfig, attach
from moe_peft.integrations.groups import group_columns, routed_configs
from tests.integrations.test_callback import rows, tiny_tokenizer  # noqa: F401
from tests.tiny import tiny_llama


def config(**fields):
    return LoraMoeConfig(task_type="CAUSAL_LM", num_experts=4, r=2, expert_groups=[0, 0, 1, 1], **fields)


def data(groups=None):
    """Rows with these groups; without a column where there are none."""
    made = [{k: v for k, v in row.items() if k != "task_type"} for row in rows(8)]
    if groups is not None:
        made = [{**row, "task_type": group} for row, group in zip(made, groups, strict=True)]
    return Dataset.from_list(made)


def trainer_of(folder, train, evaluation=None, **fields):
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        eval_strategy="steps" if evaluation is not None else "no",
        eval_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **fields,
    )
    return Trainer(
        model=get_peft_model(tiny_llama(), config()), args=args, train_dataset=train, eval_dataset=evaluation
    )


@pytest.mark.parametrize(
    "groups",
    [None, [None] * 8, [0, 1] * 4, [0, None] * 4, ["0", "1"] * 4],
    ids=["no column", "None", "all", "some", "text"],
)
def test_evaluation_needs_no_groups(groups, tmp_path):
    trainer = attach(trainer_of(tmp_path, data([0, 1] * 4), data(groups)))
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[-1])
    assert trainer.predict(data(groups)).predictions.shape[0] == 8
    assert trainer.data_collator.required


@pytest.mark.parametrize(
    ("groups", "advice"),
    [([0, None] * 4, r"leave them out with dataset.filter"), (["0", "1"] * 4, r"dataset.cast_column\('task_type'")],
)
def test_training_rows_without_a_group_say_what_to_do(groups, advice, tmp_path):
    trainer = attach(trainer_of(tmp_path, data(groups)))
    with pytest.raises(ValueError, match=rf"The column 'task_type' holds .* which is no group.*{advice}"):
        trainer.train()


def test_training_data_without_the_column_is_refused_before_the_first_step(tmp_path):
    trainer = trainer_of(tmp_path, data())
    collator = trainer.data_collator
    with pytest.raises(ValueError, match=r"the training data has no column 'task_type' \(it has \['input_ids'"):
        attach(trainer)
    assert trainer.data_collator is collator and trainer.args.remove_unused_columns


def test_packing_is_refused_with_the_reason(tmp_path, tiny_tokenizer):  # noqa: F811
    args = SFTConfig(str(tmp_path), packing=True, max_length=16, report_to=[], use_cpu=True, bf16=False)
    trainer = SFTTrainer(
        tiny_llama(), args, train_dataset=data([0, 1] * 4), processing_class=tiny_tokenizer, peft_config=config()
    )
    with pytest.raises(ValueError, match=r"packing=True joins samples.*Set packing=False, with padding_free=True"):
        attach(trainer)


def test_attaching_twice_carries_the_column_once(tmp_path):
    trainer = attach(attach(trainer_of(tmp_path, data([0, 1] * 4), data())))
    assert trainer.data_collator.column == "task_type" and not hasattr(trainer.data_collator.collator, "column")
    assert not hasattr(trainer.get_eval_dataloader.make, "make")


def test_configurations_are_found_anywhere_in_a_tree():
    model = get_peft_model(tiny_llama(), config(group_column="domain"))
    transformers_own = tiny_llama()
    transformers_own.add_adapter(config())
    tree = nn.Sequential(nn.Linear(2, 2), nn.ModuleList([model, transformers_own]))
    assert group_columns(tree) == {"domain", "task_type"}
    assert len(routed_configs(tree)) == 2
    assert group_columns(nn.Linear(2, 2)) == set()


def test_padding_free_training_and_evaluation_without_groups(tmp_path, tiny_tokenizer):  # noqa: F811
    args = SFTConfig(
        str(tmp_path),
        padding_free=True,
        max_length=None,
        max_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    evaluation = data().remove_columns("labels")
    trainer = SFTTrainer(
        tiny_llama(),
        args,
        train_dataset=data([0, 1] * 4).remove_columns("labels"),
        eval_dataset=evaluation,
        processing_class=tiny_tokenizer,
        peft_config=config(),
    )
    attach(trainer).train()
    assert torch.isfinite(torch.tensor(trainer.evaluate()["eval_loss"]))


@pytest.mark.parametrize("column", ["input_ids", "labels", "attention_mask"])
def test_a_column_that_is_an_input_of_the_model_is_refused_before_anything_changes(column):
    model = tiny_llama()
    with pytest.raises(ValueError, match=f"group_column='{column}' is an input of LlamaForCausalLM"):
        get_peft_model(model, config(group_column=column))
    assert not any("routed" in type(module).__name__.lower() for module in model.modules())
    assert not model._forward_pre_hooks


def test_the_column_of_a_router_that_reads_the_groups_is_carried_too():
    fields = {"router": "dense", "num_experts": 2, "r": 2, "router_aux_loss_coef": 0.0}
    reading = get_peft_model(tiny_llama(), RoutedConfig(scorer="task_table", group_column="task", **fields))
    other = get_peft_model(tiny_llama(), RoutedConfig(group_column="task", **fields))
    assert group_columns(reading) == {"task"} and group_columns(other) == set()


def test_a_router_that_reads_groups_is_named_where_the_data_brings_none(tmp_path):
    model = get_peft_model(tiny_llama(), RoutedConfig(scorer="task_table"))
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match=r"no column 'task_type' .* but TaskTable needs .*reads none"):
        attach(Trainer(model=model, args=args, train_dataset=data()))
