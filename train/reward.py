"""A reward model from preference pairs with TRL's RewardTrainer: a routed adapter and a score head, saved together.

accelerate launch train/reward.py --config configs/runs/qwen3_4b_reward_loramoe.yaml
"""

from __future__ import annotations

from typing import Any

from common import MoeArguments, load_data, splits
from templates import indices_by_embedding
from training import prepare, train


def make_parser() -> Any:
    """The parser of all flags; unknown keys of the YAML file are refused."""
    from trl import DatasetMixtureConfig, ModelConfig, RewardConfig, ScriptArguments, TrlParser

    return TrlParser((ScriptArguments, RewardConfig, ModelConfig, DatasetMixtureConfig, MoeArguments))


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any, moe_args: MoeArguments) -> Any:
    """Train, evaluate and save; returns the trainer."""
    from trl import RewardTrainer

    config = prepare(model_args, training_args, moe_args, task_type="SEQ_CLS")
    indices_by_embedding(training_args, config)
    evaluates = training_args.eval_strategy != "no"
    train_dataset, eval_dataset = splits(load_data(script_args, dataset_args), script_args, evaluates)
    trainer = RewardTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=config,
    )
    return train(trainer, script_args, moe_args)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
