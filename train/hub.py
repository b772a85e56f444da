"""What the training scripts do for `--push_to_hub`: save without the stock upload, then push with a card of our own.

The stock trainer makes the repository when it is built, so a run without a valid token stops before it trains. By its
default, `--hub_strategy every_save`, it uploads the adapter of every checkpoint with TRL's card. The last commit is
ours and replaces that card.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data import names_of

import moe_peft
from moe_peft.config.adapter_files import num_parameters
from moe_peft.config.card_section import write_section
from moe_peft.files import write_text
from moe_peft.hub.card import hub_card, is_hub_name, read_card

# Endings of the entries of a trainer's log that measure the machine, not the model.
TIMINGS = ("runtime", "_per_second", "total_flos")


def save_model(trainer: Any) -> None:
    """Save the adapter in the output folder; call it in every process.

    With `--push_to_hub` the trainer's own `save_model` also uploads the folder, training_args.bin included.

    Args:
        trainer: A trainer.
    """
    trainer.save_model(trainer.args.output_dir, _internal_call=True)


def push_to_hub(trainer: Any, script_args: Any, metrics: Mapping[str, float] | None = None) -> None:
    """Push the adapter in the output folder; call it in every process, the main one alone uploads.

    Args:
        trainer: A TRL trainer whose adapter has been saved.
        script_args: TRL's `ScriptArguments`; the card names its `dataset_name`, if that is one on the Hub.
        metrics: Results for the card; None takes the last ones of the run, see `last_metrics`.

    Raises:
        OSError: The upload failed; the message says why, and that the output folder still holds the adapter.
    """
    if not trainer.is_world_process_zero():
        return
    names = names_of(script_args)
    write_card(trainer, names[0] if len(names) == 1 else None)
    args = trainer.args
    commit = moe_peft.push_adapter(
        args.output_dir,
        trainer.hub_model_id,
        token=args.hub_token,
        private=args.hub_private_repo,
        revision=args.hub_revision,
        commit_message="End of training",
        metrics=last_metrics(trainer) if metrics is None else metrics,
    )
    print(f"pushed to {commit.repo_url}", flush=True)


def complete_card(trainer: Any) -> None:
    """Make the card in the output folder whole: our section with the run's results, without the stock form's blanks.

    Args:
        trainer: A trainer whose adapter has been saved; call it in the main process.
    """
    folder = Path(trainer.args.output_dir)
    model = trainer.accelerator.unwrap_model(trainer.model)
    facts = dataclasses.replace(
        model.peft_config[model.active_adapter].facts(),
        name=str(folder),
        num_parameters=num_parameters(folder),
        metrics=last_metrics(trainer),
    )
    write_text(folder / "README.md", hub_card(read_card(folder / "README.md"), facts))
    # The Hub takes no path as the name of a base model; this card is for this machine.
    write_section(folder, facts)


def write_card(trainer: Any, dataset_name: str | None) -> None:
    """Write TRL's card into the output folder, with peft's metadata and our section, as saving a model would.

    Args:
        trainer: A TRL trainer.
        dataset_name: Name or path of its data.
    """
    folder = trainer.args.output_dir
    trainer.create_model_card(
        model_name=trainer.hub_model_id.split("/")[-1],
        dataset_name=dataset_name if is_hub_name(dataset_name) else None,
    )
    model = trainer.accelerator.unwrap_model(trainer.model)
    # peft replaces the card's tags by those of the model.
    model.get_base_model().add_model_tags(read_card(Path(folder) / "README.md").data.get("tags") or [])
    model.create_or_update_model_card(folder)
    write_section(folder, model.peft_config[model.active_adapter].facts())


def last_metrics(trainer: Any) -> dict[str, float]:
    """The last evaluation's and the whole training's results of a trainer, without its timings.

    Args:
        trainer: A trainer that has trained.
    """
    metrics: dict[str, float] = {}
    for key in ("train_loss", "eval_loss"):
        entries = [entry for entry in trainer.state.log_history if key in entry]
        metrics |= entries[-1] if entries else {}
    return {name: value for name, value in metrics.items() if not name.endswith(TIMINGS)}
