"""Writes the tables of fields into docs/methods: every field of a configuration, its default, and what it means.

Run from anywhere: `python docs/write_fields.py`. A page says where a table goes, with `<!-- fields: SiraConfig -->`
before it and `<!-- end of fields -->` after it. What a field means, and where its default is from, is the help that
the configuration itself has.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

from peft import PeftConfig

from moe_peft.config.config import MoeConfig
from moe_peft.methods import METHODS

PAGES = Path(__file__).parent / "methods"
TABLE = re.compile(r"(<!-- fields: (\w+) -->\n).*?(<!-- end of fields -->)", re.DOTALL)
# Fields of every peft configuration, which mean here what they mean there, and the version of a file's layout.
STOCK = {own.name for own in dataclasses.fields(PeftConfig)} | {"schema_version"}


def fields_of(config: type[MoeConfig]) -> list[dataclasses.Field]:
    """The fields that mean something for a type, those that it declares itself first.

    Args:
        config: Class of a configuration.
    """
    own = list(inspect.get_annotations(config))
    known = {field.name: field for field in dataclasses.fields(config)}
    left_out = STOCK | set(config.absent_fields) | set(config.fixed_fields)
    names = [name for name in own if name in known] + [name for name in known if name not in own]
    return [known[name] for name in names if name not in left_out]


def table(config: type[MoeConfig]) -> str:
    """A table of Markdown.

    Args:
        config: Class of a configuration.
    """
    rows = ["| field | default | meaning |", "|---|---|---|"]
    for own in fields_of(config):
        meaning = " ".join(str(own.metadata.get("help", "")).split()).replace("|", "\\|")
        rows.append(f"| `{own.name}` | `{own.default!r}` | {meaning} |")
    return "\n".join(rows) + "\n"


def written(text: str) -> str:
    """A page with all its tables.

    Args:
        text: The page.
    """
    types = {config.__name__: config for config in METHODS.values()}
    return TABLE.sub(lambda found: f"{found[1]}\n{table(types[found[2]])}\n{found[3]}", text)


if __name__ == "__main__":
    for page in sorted(PAGES.glob("*.md")):
        page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")
