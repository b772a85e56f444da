"""`moe-peft inspect`: what a saved adapter is, and whether it is whole and has learned."""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from ..backbone.without_weights import meta_model
from ..config.adapter_files import COMPRESSED, CONFIG, WEIGHTS
from ..hub.card import is_hub_name
from ..hub.push import BESIDE
from ..tables import table
from ..telemetry.history import FILE_NAME
from ..tools.health import AdapterHealth, inspect_adapter, read_config

# What is fetched of an adapter on the Hub: its own files, and its tokenizer's.
FILES = [CONFIG, WEIGHTS, COMPRESSED, FILE_NAME, *(own for own in BESIDE if "/" not in own)]
LINES = 12


def run(argv: list[str]) -> int:
    """Print what an adapter is.

    Args:
        argv: The words after the verb.

    Returns:
        0 for a whole adapter; a broken one is an error.

    Raises:
        ValueError: It is broken, or there is none.
    """
    parser = argparse.ArgumentParser(
        prog="moe-peft inspect",
        description="Say what a saved adapter is: method, settings, parameters by place, and whether it is healthy. "
        "Exit code 1 with one line where it is broken.",
        allow_abbrev=False,
    )
    parser.add_argument("adapter", help="folder of an adapter, or its name on the Hub")
    parser.add_argument(
        "--base", help="base model, of which the configuration alone is read; default: the adapter's own"
    )
    parser.add_argument("--all", action="store_true", help="one line for every place, not for every kind of place")
    given = parser.parse_args(argv)
    folder = local_folder(given.adapter)
    base = base_model(given.base, folder)
    print(report(inspect_adapter(folder, base), every_place=given.all))
    return 0


def local_folder(name: str) -> Path:
    """The folder of an adapter, fetched from the Hub where it is none of this machine.

    Args:
        name: A folder, or a name on the Hub.

    Raises:
        ValueError: It is neither, or cannot be fetched.
    """
    path = Path(name)
    if path.exists() or not is_hub_name(name):
        if path.is_file():
            raise ValueError(f"{name} is a file. Name the folder of the adapter.")
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name} is no folder here, and cannot be fetched from the Hub ({reason}).") from error


def base_model(name: str | None, folder: Path) -> Any:
    """The base model without weights, where its configuration is at hand; None elsewhere.

    Args:
        name: What the user named; its configuration must be found.
        folder: Of the adapter, which names its own base model.

    Raises:
        ValueError: The one that was named is not found.
    """
    from transformers import AutoConfig

    config = read_config(folder) if name is None and (folder / FILES[0]).is_file() else None
    wanted = name or getattr(config, "base_model_name_or_path", None)
    if not wanted:
        return None
    try:
        found = AutoConfig.from_pretrained(wanted, local_files_only=name is None)
        return meta_model(found, getattr(config, "task_type", None))
    except (OSError, ValueError, ImportError) as error:
        if name is None:
            return None
        raise ValueError(
            f"--base {name}: its configuration cannot be read ({' '.join(str(error).split())})."
        ) from error


def report(health: AdapterHealth, *, every_place: bool = False) -> str:
    """What is printed.

    Args:
        health: Of the adapter.
        every_place: One line for each place.
    """
    config = health.config
    lines = [
        f"{config.method} ({config.adapter_type}, {config.source})",
        f"  {config.equation}",
        "",
        f"base model  {config.base_model_name_or_path or 'not named'}",
        f"weights     {health.path}, {health.bytes:,} bytes, {health.num_parameters:,} numbers at "
        f"{len(health.places)} places",
    ]
    settings = config.facts().settings
    lines += [f"settings    {', '.join(f'{name}={value}' for name, value in settings.items())}", ""]
    lines.append(_places(health, every_place))
    for name, count in list(health.further.items())[:LINES]:
        lines.append(f"and {name} in full: {count:,} numbers")
    against = f", and has every tensor that it needs on {health.checked_against}" if health.checked_against else ""
    lines += ["", f"whole: every tensor can be read and is finite{against}"]
    if not health.checked_against:
        lines.append("not compared with the base model, whose configuration is not at hand; give it with --base")
    remarks = health.remarks()
    lines += [f"remark: {remark}" for remark in remarks[:LINES]]
    if len(remarks) > LINES:
        lines.append(f"and {len(remarks) - LINES} remarks more")
    return "\n".join(lines if remarks else [*lines, "no expert is dead, and no two are equal"])


def _places(health: AdapterHealth, every_place: bool) -> str:
    groups: dict[tuple[str, int], list[Any]] = defaultdict(list)
    for place in health.places:
        name = place.name if every_place else re.sub(r"\.\d+(?=\.|$)", ".*", place.name)
        groups[name, place.num_experts].append(place)
    rows = [("place", "times", "experts", "numbers", "router rows")]
    for (name, num_experts), places in groups.items():
        norms = [place.router_norms for place in places if place.router_norms]
        lengths = f"{min(low for low, _ in norms):.3g} to {max(high for _, high in norms):.3g}" if norms else "none"
        count = sum(place.parameters for place in places)
        rows.append((name, str(len(places)), str(num_experts), f"{count:,}", lengths))
    return table(rows)
