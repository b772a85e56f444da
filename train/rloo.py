"""Reinforcement learning (RLOO) of a routed adapter with TRL's RLOOTrainer; rewards by name, dotted path or model.

accelerate launch train/rloo.py --config configs/runs/qwen3_1b7_rloo_routed.yaml
"""

from __future__ import annotations

from typing import Any

from arguments import ScriptParser
from baselines import adapter_of
from common import MoeArguments
from grpo import GrpoArguments, refuse_vllm
from rewards import load_rewards
from running import run
from training import prepare, prepare_data, train


def make_parser() -> Any:
    """The parser of all flags; unknown keys of the YAML file are refused."""
    from trl import DatasetMixtureConfig, ModelConfig, RLOOConfig

    return ScriptParser((GrpoArguments, RLOOConfig, ModelConfig, DatasetMixtureConfig, MoeArguments))


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any, moe_args: MoeArguments) -> Any:
    """Train, evaluate and save; returns the trainer."""
    from trl import RLOOTrainer

    config = prepare(model_args, training_args, moe_args, "rloo")
    refuse_vllm(training_args, config)
    rewards = load_rewards(script_args, training_args, model_args.dtype)
    evaluates = training_args.eval_strategy != "no"
    train_dataset, eval_dataset = prepare_data(
        "rloo", model_args, training_args, (script_args, dataset_args), config, evaluates
    )
    trainer = RLOOTrainer(
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
