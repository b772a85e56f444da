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
from moe_peft.config.card_section import AdapterFacts, write_section
from moe_peft.files import write_text
from moe_peft.hub.card import add_results, hub_card, is_hub_name, read_card
from moe_peft.tools.report.plots import ROUTING, draw_history

# Endings of the entries of a trainer's log that measure the machine, not the model.
TIMINGS = ("runtime", "_per_second", "total_flos")


def save_model(trainer: Any) -> None:
    """Save the adapter in the output folder; call it in every process.

    With `--push_to_hub` the trainer's own `save_model` also uploads the folder, training_args.bin included.

    Args:
        trainer: A trainer.
    """
    trainer.save_model(trainer.args.output_dir, _internal_call=True)


def push_to_hub(
    trainer: Any, script_args: Any, metrics: Mapping[str, float] | None = None, moe_args: Any = None
) -> None:
    """Push the adapter in the output folder; call it in every process, the main one alone uploads.

    Args:
        trainer: A TRL trainer whose adapter has been saved.
        script_args: TRL's `ScriptArguments`; the card names its `dataset_name`, if that is one on the Hub.
        metrics: Results for the card; None takes the last ones of the run, see `last_metrics`.
        moe_args: The adapter's flags, with the learning rates of its parts.

    Raises:
        OSError: The upload failed; the message says why, and that the output folder still holds the adapter.
    """
    if not trainer.is_world_process_zero():
        return
    names = names_of(script_args)
    write_card(trainer, names[0] if len(names) == 1 else None, facts_of(trainer, moe_args))
    add_evaluation(trainer, script_args)
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


def complete_card(trainer: Any, script_args: Any = None, moe_args: Any = None) -> None:
    """Make the card in the output folder whole: our section with the run's results, without the stock form's blanks.

    The plot of the routing is drawn beside it.

    Args:
        trainer: A trainer whose adapter has been saved; call it in the main process.
        script_args: TRL's `ScriptArguments`, which name the data of the results.
        moe_args: The adapter's flags, with the learning rates of its parts.
    """
    folder = Path(trainer.args.output_dir)
    draw_history(folder)
    facts = dataclasses.replace(facts_of(trainer, moe_args), name=str(folder))
    write_text(folder / "README.md", hub_card(read_card(folder / "README.md"), facts))
    # The Hub takes no path as the name of a base model; this card is for this machine.
    write_section(folder, facts)
    add_evaluation(trainer, script_args)


def facts_of(trainer: Any, moe_args: Any = None) -> AdapterFacts:
    """What a card says about the adapter of a run: settings, size, rates, results, and the plot beside it.

    Args:
        trainer: A trainer whose adapter has been saved.
        moe_args: The adapter's flags, with the learning rates of its parts.
    """
    folder, args = Path(trainer.args.output_dir), trainer.args
    model = trainer.accelerator.unwrap_model(trainer.model)
    training = {"learning_rate": f"{args.learning_rate:g}", "steps": trainer.state.global_step}
    for name in ("router_lr", "lora_plus_ratio"):
        value = getattr(moe_args, f"moe_{name}", None)
        training |= {} if value is None else {name: f"{value:g}"}
    return dataclasses.replace(
        model.peft_config[model.active_adapter].facts(),
        num_parameters=num_parameters(folder),
        metrics=last_metrics(trainer),
        training=training,
        plot=ROUTING if (folder / ROUTING).is_file() else None,
    )


def add_evaluation(trainer: Any, script_args: Any) -> None:
    """Write the run's evaluation into the metadata of the card in the output folder.

    Args:
        trainer: A trainer whose card has been written.
        script_args: TRL's `ScriptArguments`, which name the data; None writes nothing.
    """
    path = Path(trainer.args.output_dir) / "README.md"
    names = names_of(script_args) if script_args is not None else []
    metrics = {name: value for name, value in last_metrics(trainer).items() if isinstance(value, (int, float))}
    if not names or not any(name.startswith("eval_") for name in metrics):
        return
    card = read_card(path)
    # Paths of this machine are nobody's business.
    dataset = ", ".join(name if is_hub_name(name) else Path(name).name for name in names)
    title = (trainer.hub_model_id or Path(trainer.args.output_dir).name).split("/")[-1]
    add_results(card, title, metrics, dataset, script_args.dataset_test_split)
    write_text(path, str(card))


def write_card(trainer: Any, dataset_name: str | None, facts: AdapterFacts | None = None) -> None:
    """Write TRL's card into the output folder, with peft's metadata and our section, as saving a model would.

    Args:
        trainer: A TRL trainer.
        dataset_name: Name or path of its data.
        facts: What the section says; None takes what the configuration alone says.
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
    write_section(folder, facts or model.peft_config[model.active_adapter].facts())


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
