"""The model card of a baseline: what it is, how it is loaded, its settings and results, without a form's blanks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from baselines import Baseline
from endings import head_of
from hub import last_metrics
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel

from moe_peft.config.card_section import AUTO_CLASSES
from moe_peft.files import write_text
from moe_peft.hub.card import PIPELINES, is_hub_name

SETTINGS = ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "modules_to_save")
ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")


def write_baseline_card(trainer: Any, baseline: type[Baseline]) -> None:
    """Write the card into the output folder.

    Args:
        trainer: A trainer that has saved what it trained; call it in the main process.
        baseline: What it trained.
    """
    write_text(Path(trainer.args.output_dir) / "README.md", card(trainer, baseline))


def card(trainer: Any, baseline: type[Baseline]) -> str:
    """The whole README.md.

    Args:
        trainer: A trainer that has trained.
        baseline: What it trained.
    """
    model, folder = trainer.accelerator.unwrap_model(trainer.model), trainer.args.output_dir
    adapter = model.peft_config[model.active_adapter] if isinstance(model, PeftModel) else None
    task = str(getattr(adapter.task_type, "value", adapter.task_type)) if adapter else head_of(model)
    base = (model.get_base_model() if adapter else model).name_or_path
    settings = {name: getattr(adapter, name) for name in SETTINGS} if adapter else {}
    settings["trained parameters"] = f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,}"
    code = loading(AUTO_CLASSES.get(task, "AutoModel"), base, folder, adapter is not None)
    parts = [
        f"# {Path(folder).name}",
        f"{baseline.method} of `{base}`.",
        f"## Load it\n\n```python\n{code}\n```",
        f"## Method\n\n```\n{baseline.equation}\n```\n\nSource: "
        + ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", baseline.source)
        + ".",
        _table("Settings", {name: value for name, value in settings.items() if value not in (None, False, 0.0)}),
        _table("Results", {name: f"{value:.6g}" for name, value in last_metrics(trainer).items()}),
    ]
    data = ModelCardData(
        base_model=base if is_hub_name(base) else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=PIPELINES.get(task),
        tags=["lora"] if adapter else None,
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"))


def loading(auto_class: str, base: str, folder: str, is_adapter: bool) -> str:
    """The lines that load it.

    Args:
        auto_class: Class of transformers.
        base: Name or path of the base model.
        folder: Where it was saved.
        is_adapter: Whether that is an adapter, not a whole model.
    """
    if not is_adapter:
        return f'from transformers import {auto_class}\n\nmodel = {auto_class}.from_pretrained("{folder}")'
    lines = ["from peft import PeftModel", f"from transformers import {auto_class}", ""]
    lines += [
        f'model = {auto_class}.from_pretrained("{base}")',
        f'model = PeftModel.from_pretrained(model, "{folder}")',
    ]
    return "\n".join(lines)


def _table(heading: str, values: dict[str, Any]) -> str:
    if not values:
        return ""
    cells = {
        name: ", ".join(sorted(map(str, v))) if isinstance(v, (set, list)) else str(v) for name, v in values.items()
    }
    return "\n".join([f"## {heading}", "", "| | |", "|---|---|", *(f"| {n} | {v} |" for n, v in cells.items())])
