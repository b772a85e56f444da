"""Reinforcement learning (GRPO) of a routed adapter with TRL's GRPOTrainer; rewards by name, dotted path or model.

accelerate launch train/grpo.py --config configs/runs/qwen3_1b7_grpo_routed.yaml
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from arguments import ScriptParser
from baselines import adapter_of
from common import MoeArguments
from data import DataArguments
from rewards import load_rewards
from running import run
from training import prepare, prepare_data, train

from moe_peft.config.config import MoeConfig


@dataclass
class GrpoArguments(DataArguments):
    """What names the data, and the rewards."""

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "accuracy_reward, reasoning_accuracy_reward, think_format_reward, get_soft_overlong_punishment, "
            "or module.function of a module in the working directory."
        },
    )
    reward_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Reward model, or adapter of train/reward.py; a name on the Hub or a folder."}
    )


def make_parser() -> Any:
    """The parser of all flags; unknown keys of the YAML file are refused."""
    from trl import DatasetMixtureConfig, GRPOConfig, ModelConfig

    return ScriptParser((GrpoArguments, GRPOConfig, ModelConfig, DatasetMixtureConfig, MoeArguments))


def refuse_vllm(training_args: Any, config: MoeConfig) -> None:
    """Stop where vLLM would have to merge an adapter that cannot be merged, before a model is loaded.

    Raises:
        ValueError: It would.
    """
    if not training_args.use_vllm:
        return
    if not config.mergeable:
        raise ValueError(
            f"use_vllm: true merges the adapter into the base weights for vLLM, but {config.method} with num_experts="
            f"{config.num_experts} depends on its input and cannot be merged. Write use_vllm: false to generate with "
            "transformers, or take an adapter that merges exactly: linear layers with --moe_num_experts 1, or trained "
            "copies of experts."
        )


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any, moe_args: MoeArguments) -> Any:
    """Train, evaluate and save; returns the trainer."""
    from trl import GRPOTrainer

    config = prepare(model_args, training_args, moe_args, "grpo")
    refuse_vllm(training_args, config)
    rewards = load_rewards(script_args, training_args, model_args.dtype)
    evaluates = training_args.eval_strategy != "no"
    train_dataset, eval_dataset = prepare_data(
        "grpo", model_args, training_args, (script_args, dataset_args), config, evaluates
    )
    trainer = GRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=[reward for reward, _ in rewards],
        reward_processing_classes=[tokenizer for _, tokenizer in rewards],
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=adapter_of(config),
    )
    return train(trainer, script_args, moe_args)


if __name__ == "__main__":
    run(make_parser, main)
