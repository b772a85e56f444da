"""What every training script does around its trainer: prepare before a weight is loaded, then train, save and push."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from baseline_card import write_baseline_card
from baselines import BASELINES, Baseline, check_flags
from chat_forms import as_messages
from checkpoints import resume_point
from common import MoeArguments, model_init_kwargs, moe_config, refuse_plain_lora
from data import load_data, names_of, splits
from data_checks import check_columns, check_template
from dry_run import can_quantize_experts, check_model_name, dry_run, model_without_weights
from endings import check_output, finished, interrupted, make_room
from flags import PREFIX
from hub import complete_card, push_to_hub, save_model
from rates import choose_rate
from running import IN_TRAINING, interrupt_once
from trackers import check_trackers
from trainer_numbers import check_numbers, check_template_path

import moe_peft
from moe_peft.config.config import MoeConfig


def prepare(
    model_args: Any, training_args: Any, moe_args: MoeArguments, script: str, task_type: str = "CAUSAL_LM"
) -> MoeConfig | Baseline:
    """Check everything that needs no weights, print the dry run, and tell the trainer how to load the model.

    Args:
        model_args: TRL's `ModelConfig`.
        training_args: The trainer's arguments; the checkpoint to resume from, the learning rate where none was given,
            and `model_init_kwargs` are filled in.
        moe_args: The adapter's flags.
        script: "sft", "dpo", ...
        task_type: peft's task type.

    Returns:
        The adapter's configuration, or the baseline that takes its place.

    Raises:
        ValueError: Flags do not fit each other or the model, or there is no checkpoint to resume from.
    """
    refuse_plain_lora(model_args)
    check_flags(moe_args)
    check_model_name(model_args.model_name_or_path)
    check_numbers(training_args)
    check_template_path(getattr(training_args, "chat_template_path", None))
    config = moe_config(moe_args, task_type)
    if isinstance(config, Baseline):
        config.check_loading(model_args)
    check_packing(training_args, config)
    check_output(training_args.output_dir)
    check_trackers(training_args.report_to)
    if model_args.model_revision != "main":
        config.revision = model_args.model_revision
    training_args.resume_from_checkpoint = resume_point(training_args)
    rate = choose_rate(training_args, moe_args, config, script)
    model_config, model = model_without_weights(model_args, training_args, task_type)
    quantize_experts = moe_args.moe_quantize_experts and can_quantize_experts(model_args, model)
    dry_run(model_args, training_args, config, model_config, model, quantize_experts)
    if training_args.local_process_index == 0:
        print(rate, flush=True)
    training_args.model_init_kwargs = model_init_kwargs(model_args, training_args, quantize_experts)
    return config


def check_packing(training_args: Any, config: MoeConfig | Baseline) -> None:
    """Refuse rows of several samples for an adapter that needs the group of each.

    Args:
        training_args: The trainer's arguments.
        config: The adapter's configuration.

    Raises:
        ValueError: They do not go together.
    """
    for readers in _group_readers(config).values() if getattr(training_args, "packing", False) else ():
        raise ValueError(
            f"--packing true joins samples into rows that have no single group, but {readers[0]} needs the group of "
            "every sample. Write --packing false (with --padding_free true nothing is padded either), or "
            f"{_without(readers)}."
        )


def _group_readers(config: MoeConfig | Baseline) -> dict[str, list[str]]:
    """Columns with groups that training needs: what reads each, flags and classes of parts."""
    if isinstance(config, Baseline):
        return {}
    flags = {field.name: PREFIX + field.name for field in dataclasses.fields(config)}
    return {column: [flags.get(own, own) for own in readers] for column, readers in config.group_readers.items()}


def _without(readers: list[str]) -> str:
    """How to go without what reads groups."""
    return " and ".join(
        f"leave {own} out" if own.startswith(PREFIX) else f"take another part than {own}" for own in readers
    )


def prepare_data(
    script: str, model_args: Any, training_args: Any, data_args: tuple[Any, Any], config: Any, evaluates: bool
) -> tuple[Any, Any]:
    """Load and check the data, before a weight is loaded.

    Args:
        script: "sft", "dpo", ...
        model_args: TRL's `ModelConfig`.
        training_args: The trainer's arguments.
        data_args: `data.DataArguments`, and TRL's `DatasetMixtureConfig`.
        config: The adapter's configuration.
        evaluates: Whether rows to evaluate on are needed.

    Returns:
        Rows to train on, and rows to evaluate on, or None.

    Raises:
        ValueError: The data cannot be read, or lacks what the trainer or the adapter needs.
    """
    from transformers import AutoTokenizer

    script_args, dataset_args = data_args
    train_rows, eval_rows = splits(load_data(script_args, dataset_args, training_args.seed), script_args, evaluates)
    if script == "sft":
        train_rows, eval_rows = as_messages(train_rows), None if eval_rows is None else as_messages(eval_rows)
    where = ", ".join(names_of(script_args)) or "the data of `datasets`"
    check_columns(script, train_rows, training_args, where)
    if eval_rows is not None:
        check_columns(script, eval_rows, training_args, f"{where}, split {script_args.dataset_test_split}")
    check_groups(train_rows, config, where)
    remote = {"trust_remote_code": getattr(training_args, "trust_remote_code", False)}
    name = model_args.model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(name, revision=model_args.model_revision, **remote)
    check_template(train_rows, tokenizer, training_args, name)
    return train_rows, eval_rows


def check_groups(rows: Any, config: Any, where: str) -> None:
    """Refuse rows without the column of their groups, for an adapter that needs it.

    Args:
        rows: The rows to train on.
        config: The adapter's configuration.
        where: Where they are from, for the message.

    Raises:
        ValueError: The column is missing.
    """
    for column, readers in _group_readers(config).items():
        if rows.column_names is not None and column not in rows.column_names:
            raise ValueError(
                f"{where} has the columns {', '.join(rows.column_names)}, but {readers[0]} needs {column!r}, a whole "
                "number that says each row's group. Add the column, name another with --moe_group_column, or "
                f"{_without(readers)}."
            )


def train(trainer: Any, script_args: Any, moe_args: MoeArguments, report: Any = None) -> Any:
    """Train from step 0 or from a checkpoint, save the adapter, and push it where asked.

    Args:
        trainer: A TRL trainer that has been built.
        script_args: TRL's `ScriptArguments`.
        moe_args: The adapter's flags, with the learning rates of its parts.
        report: Measures before and after, if given; see `report.Report`.

    Returns:
        The trainer.

    Raises:
        SystemExit: With 130 after Ctrl-C, once the last whole checkpoint has been named.
    """
    training_args = trainer.args
    baseline = BASELINES.get(moe_args.moe_method)
    if baseline is None:
        moe_peft.attach(trainer, router_lr=moe_args.moe_router_lr, lora_plus_ratio=moe_args.moe_lora_plus_ratio)
    if script_args.ignore_bias_buffers:
        # What DDP is not to broadcast: attention masks that some models keep as boolean buffers.
        ignored = [name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool]
        trainer.model._ddp_params_and_buffers_to_ignore = ignored
    make_room(training_args, overwrite=moe_args.moe_overwrite)
    try:
        if report:
            report.before()
        trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    except KeyboardInterrupt:
        interrupt_once()
        interrupted(training_args)
    except Exception as error:
        setattr(error, IN_TRAINING, True)
        raise
    save_model(trainer)
    if trainer.is_world_process_zero():
        write_baseline_card(trainer, baseline) if baseline else complete_card(trainer, script_args, moe_args)
    if report:
        report.after(training_args.output_dir, trainer.model.get_base_model().name_or_path)
        if trainer.is_world_process_zero():
            complete_card(trainer, script_args, moe_args)  # with what it has measured
    elif trainer.is_world_process_zero():
        print(finished(trainer, ours=baseline is None), flush=True)
    if training_args.push_to_hub:
        trainer.push_to_hub() if baseline else push_to_hub(trainer, script_args, moe_args=moe_args)
    end_training(trainer)
    return trainer


def end_training(trainer: Any) -> None:
    """Close what logs the run, and the process group, which nothing may outlive that communicates with it.

    DDP's wrapper of the model would otherwise be what destroys the group. It does so with the interpreter's lock held,
    while a thread of the group may be waiting for that lock: now and then a run would hang after its last step.

    Args:
        trainer: A trainer that will not train again. Its model stays.
    """
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    trainer.accelerator.end_training()
