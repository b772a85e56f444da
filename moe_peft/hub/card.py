"""A model card the Hub accepts: metadata that links the adapter to peft and its base model, around our section."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path

import yaml
from huggingface_hub import CardData, EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..config.card_section import AdapterFacts, section, with_section

PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
# The usage example of TRL's cards. It does not import moe_peft, so it cannot load the adapter.
QUICK_START = re.compile(r"^## Quick start\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
NO_BASE = "[None](https://huggingface.co/None)"


def is_hub_name(name: str | None) -> bool:
    """Whether a name can be a repository on the Hub; a folder or file of this machine is none.

    Args:
        name: Name or path of a model or data set.
    """
    if not name:
        return False
    try:
        validate_repo_id(name)
        return not Path(name).exists()
    except HFValidationError:
        return False


def read_card(path: Path) -> ModelCard:
    """Read a card, or start an empty one where there is none.

    Args:
        path: Its README.md.

    Raises:
        ValueError: The metadata at the top cannot be read.
    """
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    try:
        return ModelCard(text if text.lstrip().startswith("---") else f"---\n{{}}\n---\n{text}")
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise ValueError(
            f"The metadata at the top of {path} cannot be read ({' '.join(str(error).split())}). Correct the lines "
            "between the two `---`, or delete the file."
        ) from error


def hub_card(card: ModelCard, facts: AdapterFacts) -> str:
    """Complete a card: correct its metadata, and put our section where a stock usage example is, or at the end.

    The Hub takes the library from `library_name`, and links the adapter to its base model by `base_model` and
    `base_model_relation`. It refuses the path of a folder there, so a base model that is not on the Hub is left out.

    Args:
        card: What peft, TRL or the user wrote; it is changed.
        facts: What is known about the adapter, with its name on the Hub.

    Returns:
        The whole README.md.
    """
    base_model = facts.base_model if is_hub_name(facts.base_model) else None
    facts = dataclasses.replace(facts, base_model=base_model)
    _complete_metadata(card.data, facts)
    base_text = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "a model outside the Hub"
    text = card.text.replace("\r\n", "\n").replace(NO_BASE, base_text)
    card.text = _complete_body(text, facts)
    return str(card)


def add_results(
    card: ModelCard, name: str, metrics: Mapping[str, float], dataset: str, split: str, task: str | None = None
) -> None:
    """Write the results of an evaluation into a card's metadata, where the Hub reads them (`EvalResult`).

    Args:
        card: It is changed; results of other data stay.
        name: What the results call the model.
        metrics: Results by name; those that begin with "eval_" are of an evaluation, the others are left out.
        dataset: Name of the data.
        split: Which part of it.
        task: The Hub's name of the task; None takes the card's `pipeline_tag`.
    """
    task = task or card.data.get("pipeline_tag") or "other"
    # A name without its owner may be a file's.
    kind = dataset if "/" in dataset and is_hub_name(dataset) else "custom"
    made = [
        EvalResult(
            task_type=task,
            dataset_type=kind,
            dataset_name=dataset,
            dataset_split=split,
            metric_type=metric.removeprefix("eval_"),
            metric_value=float(value),
        )
        for metric, value in metrics.items()
        if metric.startswith("eval_") and math.isfinite(value)
    ]
    own = {(result.dataset_name, result.dataset_split, result.metric_type) for result in made}
    others = [
        result
        for result in card.data.get("eval_results") or []
        if (result.dataset_name, result.dataset_split, result.metric_type) not in own
    ]
    if made or others:
        card.data["model_name"], card.data["eval_results"] = name, [*others, *made]


def _complete_metadata(data: CardData, facts: AdapterFacts) -> None:
    tags = {tag for tag in data.get("tags") or [] if not tag.startswith("base_model:")}
    tags |= {"moe-peft", "peft", facts.adapter_type.lower()}
    data["base_model"] = facts.base_model
    data["base_model_relation"] = "adapter" if facts.base_model else None
    if facts.base_model:
        tags.add(f"base_model:adapter:{facts.base_model}")
    data["tags"] = sorted(tags)
    data["library_name"] = "peft"
    data["pipeline_tag"] = data.get("pipeline_tag") or PIPELINES.get(facts.task_type or "")
    data.pop("licence")  # TRL's placeholder for `license`
    datasets = data.get("datasets") or []
    datasets = [datasets] if isinstance(datasets, str) else datasets
    data["datasets"] = [name for name in datasets if is_hub_name(name)] or None


def _complete_body(text: str, facts: AdapterFacts) -> str:
    ours = section(facts)
    rest = with_section(text, "").strip()
    stock = {line.strip() for line in ModelCard.from_template(ModelCardData()).text.splitlines()}
    kept = [line for line in rest.splitlines() if line.strip() not in stock]
    if all(line.startswith(("### Framework versions", "- PEFT ")) for line in kept):
        # The form that peft starts with, which nobody has filled in.
        title = f"# {(facts.name or 'adapter').split('/')[-1]}"
        return "\n\n".join([title, ours, *kept]) + "\n"
    quick_start = QUICK_START.search(rest)
    if quick_start and "import moe_peft" not in quick_start.group():
        return f"{rest[: quick_start.start()]}{ours}\n\n{rest[quick_start.end() :]}\n"
    return with_section(text, ours)
