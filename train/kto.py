"""Optimisation on good and bad examples (KTO) of a routed adapter with TRL's KTOTrainer.

accelerate launch train/kto.py --config configs/runs/qwen3_4b_kto_sira.yaml
"""

from __future__ import annotations

from typing import Any

from arguments import ScriptParser
from baselines import adapter_of
from common import MoeArguments
from data import DataArguments
from running import run
from training import prepare, prepare_data, train


def make_parser() -> Any:
    """The parser of all flags; unknown keys of the YAML file are refused."""
    from trl import DatasetMixtureConfig, KTOConfig, ModelConfig

    return ScriptParser((DataArguments, KTOConfig, ModelConfig, DatasetMixtureConfig, MoeArguments))


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any, moe_args: MoeArguments) -> Any:
    """Train, evaluate and save; returns the trainer."""
    from trl import KTOTrainer

    config = prepare(model_args, training_args, moe_args, "kto")
    evaluates = training_args.eval_strategy != "no"
    train_dataset, eval_dataset = prepare_data(
        "kto", model_args, training_args, (script_args, dataset_args), config, evaluates
    )
    trainer = KTOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=adapter_of(config),
    )
    return train(trainer, script_args, moe_args)


if __name__ == "__main__":
    run(make_parser, main)
