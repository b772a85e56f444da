"""The help of the scripts: the adapter's flags first, grouped by what they describe, then model, data and trainer."""

from __future__ import annotations

import argparse
import os
import re
from typing import Any

from flags import METHOD_FLAG, SCRIPT_FIELDS, group_of

WIDTH = 110
# Titles of the sections of other dataclasses, by the end of their names, in the order of the help.
TITLES = {
    "ModelConfig": "The model to adapt",
    "ScriptArguments": "The data",
    "GrpoArguments": "The data and the rewards",
    "DatasetMixtureConfig": "Several data sets (in the file of a run)",
    "SelectionArguments": "Scoring and selecting",
}
FILES = """\
files and their order:
  --config RUN            a YAML file of settings, or the name of one that `moe-peft configs` lists
  --moe_config METHOD     the same for the adapter's settings alone
  --moe_preset METHOD     the same as --moe_config, as in --moe_preset hydralora
                          A flag counts before --moe_config, that before --config, and that before the default. Where
                          --moe_config describes another method than --config, the run's adapter is left out whole."""


def help_text(program: str, sections: list[tuple[type, list[argparse.Action]]]) -> str:
    """Help in the order in which a newcomer asks.

    Args:
        program: What was typed.
        sections: Dataclass -> its flags.
    """
    adapter = [action for _, actions in sections for action in actions if action.dest.startswith("moe_")]
    parts = [
        f"usage: {program} --model_name_or_path MODEL --dataset_name DATA --moe_method METHOD --output_dir FOLDER"
    ]
    parts += [f"       {program} --config RUN [--flag value ...]", "", FILES]
    groups: dict[str, list[argparse.Action]] = {}
    for action in adapter:
        title = "the adapter" if action.dest in SCRIPT_FIELDS else group_of(action.dest)
        groups.setdefault(title, []).append(action)
    for title, actions in sorted(groups.items(), key=lambda item: _rank(item[1])):
        parts += ["", _section(title, actions)]
    order = list(TITLES)
    rest = [(_title(dtype), [a for a in actions if a not in adapter], dtype.__name__) for dtype, actions in sections]
    rest.sort(key=lambda item: order.index(item[2]) if item[2] in order else len(order))
    parts += [f"\n{_section(title, actions)}" for title, actions, _ in rest if actions]
    return "\n".join(parts) + "\n"


def _rank(actions: list[argparse.Action]) -> tuple[bool, int]:
    """The group of the method itself first, then those of most flags' first appearance."""
    return (all(action.dest != METHOD_FLAG for action in actions), 0)


def _title(dtype: Any) -> str:
    return TITLES.get(dtype.__name__, f"The trainer ({dtype.__name__})")


def _section(title: str, actions: list[argparse.Action]) -> str:
    width = min(WIDTH, int(os.environ.get("COLUMNS", WIDTH)))
    formatter = argparse.HelpFormatter(prog="", max_help_position=32, width=width)
    formatter.start_section(title)
    formatter.add_arguments([_underscored(action) for action in actions if action.option_strings])
    formatter.end_section()
    return formatter.format_help().strip("\n")


def _underscored(action: argparse.Action) -> argparse.Action:
    """A flag in one spelling alone; the one with hyphens works as well, and needs no line of its own."""
    own = argparse.Action(
        [option for option in action.option_strings if not re.search("[a-z0-9]-[a-z0-9]", option)][:1],
        action.dest,
        nargs=action.nargs,
        help=action.help or " ",
        metavar="" if action.nargs in ("?", 0) else (action.metavar or _kind(action)),
    )
    own.default = None
    own.help = re.sub(r"\s*\(default: [^)]*\)$", "", own.help or "")
    return own


def _kind(action: argparse.Action) -> str:
    """What a flag takes, in a word."""
    if action.choices:
        return "|".join(str(choice) for choice in action.choices)
    return {int: "INT", float: "FLOAT"}.get(action.type, "VALUE")  # type: ignore[call-overload]
