"""Where the training scripts and the configurations are: inside an installed package, beside it in a clone."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
# Where a name is looked up, in this order.
KINDS = ("runs", "methods", "accelerate")


def shipped(name: str) -> Path:
    """A folder that ships with the package.

    Args:
        name: "train" or "configs".

    Raises:
        FileNotFoundError: The package has been copied without it.
    """
    for folder in (PACKAGE / name, PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"The folder {name} is neither in {PACKAGE} nor beside it. Install peft-moe again.")


def names_of(kind: str) -> dict[str, Path]:
    """Configurations of one kind by name.

    Args:
        kind: "runs", "methods" or "accelerate".
    """
    return {path.stem: path for path in sorted((shipped("configs") / kind).glob("*.yaml"))}


def find_config(value: str, flag: str, kinds: tuple[str, ...] = KINDS) -> Path:
    """The file of a configuration that was given by its path or by its name.

    Args:
        value: A path, or a name that `moe-peft configs` lists, with or without "runs/", "routed_" or ".yaml";
            capitals, hyphens and underscores make no difference, so that HydraLoRA is a name too.
        flag: What it was given to, for the message; empty where nothing was.
        kinds: Where names are looked up.

    Raises:
        ValueError: There is no such file or name, or it is a folder.
    """
    path, what = Path(value), f"{flag} {value}".strip()
    if path.is_file():
        return path
    if path.is_dir():
        raise ValueError(f"{what} is a folder. Name a YAML file in it, or one that `moe-peft configs` lists.")
    bare = value.removesuffix(".yaml").removeprefix("configs/")
    for kind in kinds:
        found = names_of(kind).get(bare.removeprefix(f"{kind}/"))
        if found is not None:
            return found
    for kind in kinds:
        written = {_plain(name): path for name, path in names_of(kind).items()}
        short = {_plain(name.removeprefix("routed_")): path for name, path in names_of(kind).items()}
        found = {**short, **written}.get(_plain(bare.removeprefix(f"{kind}/")))
        if found is not None:
            return found
    known = [name for kind in kinds for name in names_of(kind)]
    near = difflib.get_close_matches(bare, known, n=2)
    hint = f" Nearest names: {', '.join(near)}." if near else ""
    raise ValueError(
        f"{what}: there is no such file, and no configuration of that name.{hint} See `moe-peft configs`."
    )


def _plain(name: str) -> str:
    """A name without capitals and what stands between its words."""
    return re.sub(r"[^a-z0-9]", "", name.lower())
