"""The part of an adapter's model card that says what the adapter computes, how large it is and how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..files import write_text

BEGIN = "<!-- moe_peft: written anew on every save and push; put words of your own outside of this part -->"
END = "<!-- moe_peft: end -->"
SECTION = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
# Fields of a configuration that the card shows where they are set.
SETTINGS = ["num_experts", "top_k", "router", "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules"]
SETTINGS += ["layers_to_transform", "modules_to_save", "router_aux_loss_coef", "router_z_loss_coef"]
SETTINGS += ["per_layer", "scorer", "gate", "router_args", "experts_args", "losses"]
SETTINGS += ["expert_groups", "group_column"]
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


@dataclass(frozen=True)
class AdapterFacts:
    """What a card says about an adapter.

    Attributes:
        method: Name of the method, for example "LoRAMoE".
        adapter_type: peft's name of the adapter type, for example "LORAMOE".
        equation: The method's equation, in plain text.
        source: Its paper.
        task_type: peft's task type, if any.
        settings: Fields of the configuration and their values.
        base_model: Name or path of the base model, if known.
        name: Name of the adapter on the Hub, if it has one.
        num_parameters: Number of saved weights, if known.
        metrics: Results of the run by name.
        imports: Modules from outside of the package that must be imported first, with what they register.
        training: Settings of the run by name, such as its learning rates.
        plot: Image beside the card that shows the routing, if there is one.
    """

    method: str
    adapter_type: str
    equation: str
    source: str
    task_type: str | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    base_model: str | None = None
    name: str | None = None
    num_parameters: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    imports: Mapping[str, list[str]] = field(default_factory=dict)
    training: Mapping[str, object] = field(default_factory=dict)
    plot: str | None = None


def section(facts: AdapterFacts) -> str:
    """Markdown between `BEGIN` and `END`: a usage example, the method, its size and its results.

    Args:
        facts: What is known about the adapter.
    """
    auto_class = AUTO_CLASSES.get(facts.task_type or "", "AutoModel")
    source = re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", facts.source)
    parts = [
        f"""{BEGIN}
## Load this adapter

{facts.method}, an adapter of the package `peft-moe`. Importing `moe_peft` registers its type with peft; without it
loading stops with `KeyError: '{facts.adapter_type}'`. `moe-peft run -m TOOL ...` runs a tool that does not import it.

{_imports(facts)}
from peft import PeftModel
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{facts.base_model or "path/or/name-of-the-base-model"}")
model = PeftModel.from_pretrained(model, "{facts.name or "path/or/name-of-this-adapter"}")
```

### Method

```
{facts.equation}
```

Source: {source}."""
    ]
    size = {} if facts.num_parameters is None else {"parameters of the adapter": f"{facts.num_parameters:,}"}
    parts += _table("Parameters", "setting", {**facts.settings, **size})
    parts += _table("Training", "setting", facts.training)
    parts += _table("Results", "metric", {name: f"{value:.6g}" for name, value in facts.metrics.items()})
    if facts.plot is not None:
        parts.append(
            f"### Routing\n\n![Share of the gate mass of each expert by layer, at the end of training]({facts.plot})"
        )
    return "\n\n".join([*parts, END])


def with_section(text: str, new_section: str) -> str:
    """Put the section in the place of an older one, or at the end.

    Args:
        text: A card, or its body.
        new_section: What `section` returned.
    """
    if SECTION.search(text):
        return SECTION.sub(lambda match: new_section, text, count=1)
    return f"{text.rstrip()}\n\n{new_section}\n".lstrip("\n")


def write_section(folder: str | Path, facts: AdapterFacts) -> None:
    """Bring the section of a folder's model card up to date; everything else in the card stays.

    Args:
        folder: Folder of a saved adapter; nothing happens when it has no README.md.
        facts: What is known about the adapter.
    """
    card = Path(folder) / "README.md"
    if card.is_file():
        write_text(card, with_section(card.read_text(encoding="utf-8"), section(facts)))


def _imports(facts: AdapterFacts) -> str:
    """The first lines of the usage example, after what they are about where others' modules are among them."""
    lines = [
        f"import {module}  # {', '.join(names)}"
        if module != "__main__"
        else f"# run the program that defines {', '.join(names)} first"
        for module, names in facts.imports.items()
    ]
    about = "Its author's own modules are not part of that package: get them from the author.\n\n" if lines else ""
    return "\n".join([f"{about}```python", "import moe_peft", *lines])


def _table(heading: str, column: str, values: Mapping[str, object]) -> list[str]:
    if not values:
        return []
    rows = [f"| {name} | {_cell(value)} |" for name, value in values.items()]
    return ["\n".join([f"### {heading}", "", f"| {column} | value |", "|---|---|", *rows])]


def _cell(value: object) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {_cell(own)}" for key, own in value.items())
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text.replace("|", "\\|")
