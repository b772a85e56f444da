"""A reward model from preference pairs with TRL's RewardTrainer: a routed adapter and a score head, saved together.

accelerate launch train/reward.py --config configs/runs/qwen3_4b_reward_loramoe.yaml
"""

from __future__ import annotations

from typing import Any

from arguments import ScriptParser
from baselines import adapter_of
from common import MoeArguments
from data import DataArguments
from running import run
from templates import indices_by_embedding
from training import prepare, prepare_data, train


def make_parser() -> Any:
    """The parser of all flags; unknown keys of the YAML file are refused."""
    from trl import DatasetMixtureConfig, ModelConfig, RewardConfig

    return ScriptParser((DataArguments, RewardConfig, ModelConfig, DatasetMixtureConfig, MoeArguments))


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any, moe_args: MoeArguments) -> Any:
    """Train, evaluate and save; returns the trainer."""
    from trl import RewardTrainer

    config = prepare(model_args, training_args, moe_args, "reward", task_type="SEQ_CLS")
    indices_by_embedding(training_args, config)
    evaluates = training_args.eval_strategy != "no"
    train_dataset, eval_dataset = prepare_data(
        "reward", model_args, training_args, (script_args, dataset_args), config, evaluates
    )
    trainer = RewardTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=adapter_of(config),
    )
    return train(trainer, script_args, moe_args)


if __name__ == "__main__":
    run(make_parser, main)
