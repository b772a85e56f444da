"""What every training script does around its trainer: prepare before a weight is loaded, then train, save and push."""

from __future__ import annotations

from typing import Any

import torch
from checkpoints import resume_point
from common import MoeArguments, model_init_kwargs, moe_config, refuse_plain_lora
from dry_run import can_quantize_experts, dry_run, model_without_weights
from hub import push_to_hub, save_model

import moe_peft
from moe_peft.config.config import MoeConfig


def prepare(model_args: Any, training_args: Any, moe_args: MoeArguments, task_type: str = "CAUSAL_LM") -> MoeConfig:
    """Check everything that needs no weights, print the dry run, and tell the trainer how to load the model.

    Args:
        model_args: TRL's `ModelConfig`.
        training_args: The trainer's arguments; the checkpoint to resume from and `model_init_kwargs` are filled in.
        moe_args: The adapter's flags.
        task_type: peft's task type.

    Returns:
        The adapter's configuration.

    Raises:
        ValueError: Flags do not fit each other or the model, or there is no checkpoint to resume from.
    """
    refuse_plain_lora(model_args)
    config = moe_config(moe_args, task_type)
    if model_args.model_revision != "main":
        config.revision = model_args.model_revision
    training_args.resume_from_checkpoint = resume_point(training_args)
    model_config, model = model_without_weights(model_args, training_args, task_type)
    quantize_experts = moe_args.moe_quantize_experts and can_quantize_experts(model_args, model)
    dry_run(model_args, training_args, config, model_config, model, quantize_experts)
    training_args.model_init_kwargs = model_init_kwargs(model_args, training_args, quantize_experts)
    return config


def train(trainer: Any, script_args: Any, moe_args: MoeArguments, report: Any = None) -> Any:
    """Train from step 0 or from a checkpoint, save the adapter, and push it where asked.

    Args:
        trainer: A TRL trainer that has been built.
        script_args: TRL's `ScriptArguments`.
        moe_args: The adapter's flags, with the learning rates of its parts.
        report: Measures before and after, if given; see `report.Report`.

    Returns:
        The trainer.
    """
    training_args = trainer.args
    moe_peft.attach(trainer, router_lr=moe_args.moe_router_lr, lora_plus_ratio=moe_args.moe_lora_plus_ratio)
    if script_args.ignore_bias_buffers:
        # What DDP is not to broadcast: attention masks that some models keep as boolean buffers.
        ignored = [name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool]
        trainer.model._ddp_params_and_buffers_to_ignore = ignored
    if report:
        report.before()
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    save_model(trainer)
    if report:
        report.after(training_args.output_dir, trainer.model.get_base_model().name_or_path)
    if training_args.push_to_hub:
        push_to_hub(trainer, script_args)
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
