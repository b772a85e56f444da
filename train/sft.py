"""Supervised fine-tuning of a routed adapter with TRL's SFTTrainer.

accelerate launch train/sft.py --config configs/runs/quickstart.yaml
accelerate launch train/sft.py --model_name_or_path Qwen/Qwen3-8B --dataset_name trl-lib/Capybara --load_in_4bit \
    --moe_method loramoe --moe_num_experts 8 --output_dir outputs/qwen3-loramoe
"""

from __future__ import annotations

from typing import Any

from common import MoeArguments, dry_run, load_data, model_init_kwargs, moe_config, refuse_plain_lora
from hub import push_to_hub, save_model
from report import Report

import moe_peft


def make_parser() -> Any:
    """The parser of all flags; unknown keys of the YAML file are refused."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

    return TrlParser((ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig, MoeArguments))


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any, moe_args: MoeArguments) -> None:
    """Train, evaluate and save."""
    from transformers import AutoModelForCausalLM
    from trl import SFTTrainer

    refuse_plain_lora(model_args)
    config = moe_config(moe_args)
    dry_run(model_args, training_args, config)

    dataset = load_data(script_args, dataset_args)
    model = AutoModelForCausalLM.from_pretrained(
        model_args.model_name_or_path, **model_init_kwargs(model_args, training_args)
    )
    evaluates = training_args.eval_strategy != "no" or moe_args.moe_report
    trainer = SFTTrainer(
        model=model,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if evaluates else None,
        peft_config=config,
    )
    moe_peft.attach(trainer)

    report = Report(trainer, dataset[script_args.dataset_test_split]) if moe_args.moe_report else None
    if report:
        report.before()
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    save_model(trainer)
    if report:
        report.after(training_args.output_dir, model_args.model_name_or_path)
    if training_args.push_to_hub:
        push_to_hub(trainer, script_args)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
