"""Supervised fine-tuning of a routed adapter with TRL's SFTTrainer.

accelerate launch train/sft.py --config configs/runs/quickstart.yaml
accelerate launch train/sft.py --model_name_or_path Qwen/Qwen3-8B --dataset_name trl-lib/Capybara --load_in_4bit \
    --moe_method loramoe --moe_num_experts 8 --output_dir outputs/qwen3-loramoe
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from arguments import ScriptParser
from baselines import adapter_of
from common import MoeArguments
from data import DataArguments
from report import Report
from running import run
from templates import complete_tied_head, model_and_tokenizer
from training import prepare, prepare_data, train


@dataclass
class SftMoeArguments(MoeArguments):
    """The adapter's fields, and a report of the run."""

    moe_report: bool = field(
        default=False,
        metadata={
            "help": "Print held-out loss and an answer before and after, and the expert load; reload and compare."
        },
    )


def make_parser() -> Any:
    """The parser of all flags; unknown keys of the YAML file are refused."""
    from trl import DatasetMixtureConfig, ModelConfig, SFTConfig

    return ScriptParser((DataArguments, SFTConfig, ModelConfig, DatasetMixtureConfig, SftMoeArguments))


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any, moe_args: SftMoeArguments) -> Any:
    """Train, evaluate and save; returns the trainer."""
    from trl import SFTTrainer

    config = prepare(model_args, training_args, moe_args, "sft")
    evaluates = training_args.eval_strategy != "no" or moe_args.moe_report
    train_dataset, eval_dataset = prepare_data(
        "sft", model_args, training_args, (script_args, dataset_args), config, evaluates
    )
    model, tokenizer = model_and_tokenizer(model_args, training_args, config)
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=adapter_of(config),
    )
    complete_tied_head(trainer.model)
    return train(trainer, script_args, moe_args, Report(trainer, eval_dataset) if moe_args.moe_report else None)


if __name__ == "__main__":
    run(make_parser, main)
