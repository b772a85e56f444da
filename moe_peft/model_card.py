"""The part of an adapter's model card that says what it is and how to load it."""

from __future__ import annotations

from pathlib import Path

HEADING = "## Load this adapter"


def usage_section(method: str, equation: str, source: str, base_model: str | None) -> str:
    """Markdown that says what the adapter computes and how it is loaded.

    Args:
        method: Name of the adapter type, for example "LoRAMoE".
        equation: Its equation, in plain text.
        source: Its paper.
        base_model: Name or path of the base model, if known.
    """
    base = base_model or "path/or/name-of-the-base-model"
    return f"""{HEADING}

A {method} adapter of the package `peft-moe` (`pip install peft-moe`): `{equation}` ({source}).
Importing `moe_peft` registers the adapter type with peft; without it loading stops with a `KeyError` of the type's
name.

```python
import moe_peft
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "path/or/name-of-this-adapter")
```
"""


def add_usage(folder: str, method: str, equation: str, source: str, base_model: str | None) -> None:
    """Put the usage section at the end of a folder's model card, once.

    Args:
        folder: Folder of a saved adapter; nothing happens when it has no README.md.
        method: See `usage_section`.
        equation: See `usage_section`.
        source: See `usage_section`.
        base_model: See `usage_section`.
    """
    card = Path(folder) / "README.md"
    if not card.is_file():
        return
    text = card.read_text(encoding="utf-8")
    if HEADING not in text:
        card.write_text(f"{text.rstrip()}\n\n{usage_section(method, equation, source, base_model)}", encoding="utf-8")
