"""Select the experts of a mixture-of-experts model that a data set uses most, for ESFT (arXiv 2407.01906).

accelerate launch train/select_experts.py --model_name_or_path allenai/OLMoE-1B-7B-0924 --dtype bfloat16 \
    --dataset_name trl-lib/Capybara --output_dir outputs/experts
accelerate launch train/sft.py --model_name_or_path allenai/OLMoE-1B-7B-0924 --dataset_name trl-lib/Capybara \
    --moe_method esft --moe_experts outputs/experts/expert_config.json --output_dir outputs/olmoe-esft

Forward passes alone, over the rows that train/sft.py would train on: joined and cut into rows of max_length tokens, as
the authors do; `--packing false` scores every example by itself. In the output folder: `expert_config.json` (the
selection, in the authors' form), `summary.json` (the scores) and `selection.png`. With several processes each scores
its part of the data.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arguments import ScriptParser
from chat_forms import as_messages
from common import model_init_kwargs, refuse_plain_lora
from data import DataArguments, load_data, names_of, splits
from data_checks import check_columns, check_template
from dry_run import can_quantize_experts, model_without_weights
from flags import methods_of_selections
from running import run
from trainer_numbers import check_numbers, check_template_path
from trl import SFTConfig

import moe_peft
from moe_peft.cli.launch import PROGRAM
from moe_peft.files import filled_folder
from moe_peft.methods import METHODS
from moe_peft.selection.scores import AGGREGATES, CRITERIA
from moe_peft.selection.scoring import sparse_layers
from moe_peft.selection.tally import MASKS


@dataclass
class ScoringConfig(SFTConfig):
    """TRL's settings, of which those of the data and the model count, with the authors' values as defaults."""

    max_length: int | None = field(default=4096, metadata={"help": "Tokens of a scored row."})
    packing: bool = field(default=True, metadata={"help": "Join the examples and cut them into full rows."})
    packing_strategy: str = field(default="wrapped", metadata={"help": "wrapped, or bfd to keep examples whole."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Rows per forward pass."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Not used: there is no backward pass."})
    bf16: bool | None = field(default=False, metadata={"help": "Not used: --dtype is what the model computes in."})
    seed: int = field(default=5934875, metadata={"help": "Seed of the order of the examples."})


@dataclass
class SelectionArguments:
    """How experts are scored and selected; see `moe_peft.score_experts` and `moe_peft.select_experts`."""

    criterion: str = field(default="token", metadata={"help": "Score of an expert.", "choices": CRITERIA})
    p: float | None = field(
        default=None, metadata={"help": "Score that a layer's experts reach together; default: 0.2 token, 0.1 gate."}
    )
    max_parameters: int | None = field(
        default=None, metadata={"help": "Parameters that the experts have at most; the largest p is taken for it."}
    )
    aggregate: str = field(default="token", metadata={"help": "Mean over tokens or samples.", "choices": AGGREGATES})
    normalize_scores: bool = field(default=False, metadata={"help": "Make p a share of the layer's summed scores."})
    min_experts: int = field(default=0, metadata={"help": "Take at least this many experts per layer."})
    score_mask: str = field(default="all", metadata={"help": "Score all tokens or completions.", "choices": MASKS})
    max_tokens: int = field(default=131072, metadata={"help": "Tokens to score, over all processes."})
    train_shared_experts: bool = field(
        default=False, metadata={"help": "Write that the experts which every token uses are trained as well."}
    )


def make_parser() -> Any:
    """The parser of all flags; unknown keys of the YAML file are refused."""
    from trl import DatasetMixtureConfig, ModelConfig

    return ScriptParser((DataArguments, ScoringConfig, ModelConfig, DatasetMixtureConfig, SelectionArguments))


def main(
    script_args: Any, training_args: Any, model_args: Any, dataset_args: Any, arguments: SelectionArguments
) -> moe_peft.ExpertSelection:
    """Score, select, write and print; returns the selection."""
    from accelerate import PartialState
    from transformers import AutoTokenizer

    refuse_plain_lora(model_args)
    check_rule(arguments)
    check_numbers(training_args)
    check_template_path(training_args.chat_template_path)
    _, model = model_without_weights(model_args, training_args, "CAUSAL_LM")
    first = sparse_layers(model)[0]
    training_args.model_init_kwargs = model_init_kwargs(
        model_args, training_args, can_quantize_experts(model_args, model)
    )
    rows, _ = splits(load_data(script_args, dataset_args, training_args.seed), script_args, evaluates=False)
    rows = as_messages(rows)
    name = ", ".join(names_of(script_args)) or "the data of `datasets`"
    check_columns("select_experts", rows, training_args, name)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, revision=model_args.model_revision)
    check_template(rows, tokenizer, training_args, model_args.model_name_or_path)
    check_completions(rows, training_args, arguments)
    trainer = make_trainer(model_args, training_args, own_part(rows, training_args.seed), first.index)
    scores = score(trainer, arguments)
    selection = moe_peft.select_experts(
        scores,
        arguments.p,
        max_parameters=arguments.max_parameters,
        criterion=arguments.criterion,
        aggregate=arguments.aggregate,
        min_experts=arguments.min_experts,
        normalize_scores=arguments.normalize_scores,
    )
    selection = dataclasses.replace(selection, shared_experts=arguments.train_shared_experts)
    if PartialState().is_main_process:
        report(selection, scores, Path(training_args.output_dir))
    PartialState().wait_for_everyone()
    return selection


def check_rule(arguments: SelectionArguments) -> None:
    """Stop at numbers that cannot select, before a model is loaded.

    Args:
        arguments: How to score and select.

    Raises:
        ValueError: A number is out of its range.
    """
    p, shares = arguments.p, arguments.criterion == "token" or arguments.normalize_scores
    if p is not None and not (0 < p <= 1 if shares else 0 < p < float("inf")):
        above = "a number above 0"
        what = f"the scores of a layer add up to one, so that it must be {above}, at most 1" if shares else above
        raise ValueError(f"--p {p:g}: {what}. The authors' own are 0.2 by tokens and 0.1 by gates.")
    if p is not None and arguments.max_parameters is not None:
        raise ValueError(f"--p {p:g} and --max_parameters {arguments.max_parameters} exclude each other: give one.")
    numbers = {"min_experts": 0, "max_tokens": 1, "max_parameters": 1}
    for name, least in numbers.items():
        value = getattr(arguments, name)
        if value is None:
            continue
        if value < least:
            raise ValueError(f"--{name} {value} must be at least {least}.")


def check_completions(rows: Any, training_args: Any, arguments: SelectionArguments) -> None:
    """Stop where completions are to be scored but the data does not tell them from prompts.

    Args:
        rows: The data set.
        training_args: TRL's `SFTConfig`.
        arguments: How to score.

    Raises:
        ValueError: There are no completions.
    """
    told = training_args.assistant_only_loss or "completion" in (rows.column_names or ["completion"])
    if arguments.score_mask == "completion" and not told:
        raise ValueError(
            f"--score_mask completion: the data has the columns {rows.column_names}, which hold no completions. For "
            "conversations add --assistant_only_loss true; otherwise score all tokens."
        )


def own_part(rows: Any, seed: int) -> Any:
    """The examples of this process in random order, read and tokenized only as far as they are scored.

    Args:
        rows: A `Dataset`, or an `IterableDataset`, which is shuffled within its buffer.
        seed: Seed of the order.
    """
    from accelerate import PartialState
    from datasets import Dataset
    from datasets.distributed import split_dataset_by_node

    state = PartialState()
    part = split_dataset_by_node(rows.shuffle(seed=seed), state.process_index, state.num_processes)
    return part.to_iterable_dataset() if isinstance(part, Dataset) else part


def make_trainer(model_args: Any, training_args: Any, rows: Any, layer: int) -> Any:
    """TRL's trainer, for what it does before training: load the model and make rows of tokens out of the data.

    Args:
        model_args: TRL's `ModelConfig`.
        training_args: TRL's `SFTConfig`.
        rows: The examples.
        layer: Index of a layer with experts.
    """
    from trl import SFTTrainer

    training_args.max_steps = 1  # the length of the data is not known
    # A quantized model is taken with an adapter only; the copy of one expert is the smallest there is.
    adapter = METHODS[methods_of_selections()[0]](task_type="CAUSAL_LM", experts={str(layer): [0]})
    return SFTTrainer(model=model_args.model_name_or_path, args=training_args, train_dataset=rows, peft_config=adapter)


def score(trainer: Any, arguments: SelectionArguments) -> moe_peft.ExpertScores:
    """Score the experts of the model itself, without the trainer's adapter.

    Args:
        trainer: TRL's trainer.
        arguments: How to score.
    """
    from torch.utils.data import DataLoader

    args = trainer.args
    loader = DataLoader(
        trainer.train_dataset, batch_size=args.per_device_train_batch_size, collate_fn=trainer.data_collator
    )
    with trainer.model.disable_adapter():
        return moe_peft.score_experts(
            trainer.model,
            loader,
            max_tokens=arguments.max_tokens,
            score_mask=arguments.score_mask,
            show_progress=args.process_index == 0 and not args.disable_tqdm,
        )


def report(selection: moe_peft.ExpertSelection, scores: moe_peft.ExpertScores, folder: Path) -> None:
    """Write the files, all of them or none, and print the table and what to do next.

    Args:
        selection: Selected experts.
        scores: What they were selected by.
        folder: Output folder, made if absent.
    """
    with filled_folder(folder) as growing:
        selection.save(growing / "expert_config.json")
        scores.save(growing / "summary.json")
        print(f"{scores.num_tokens:,} tokens of {scores.num_samples:,} samples")
        print(moe_peft.selection_table(selection, scores))
        try:
            moe_peft.plot_selection({folder.name: selection}, growing / "selection.png")
        except ImportError as error:
            print(f"No plot: {error}")
    method = methods_of_selections()[0]
    program = "moe-peft sft" if os.environ.get(PROGRAM) else "train/sft.py"
    print(f"Train them: {program} --moe_method {method} --moe_experts {folder / 'expert_config.json'}", flush=True)


if __name__ == "__main__":
    run(make_parser, main)
