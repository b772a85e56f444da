"""Saving and loading: into fresh models, new names and taken names, and files that are damaged."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .configurations import draw
from .laws import BrokenLawError, logits, require_close
from .life import Life
from .training import randomize


def _saved(life: Life, name: str) -> Path:
    return life.door.save(life.model, Path(tempfile.mkdtemp(dir=life.folder)), name)


def save_and_load(life: Life, rng: random.Random) -> None:
    """A saved adapter loads on a fresh base, under any name, and is the same to the last bit."""
    if not life.known or life.merged or life.is_stacked:
        return
    name, batch = rng.choice(list(life.known)), life.world.batch(rng)
    other = rng.choice((name, "default", "loaded"))
    life.log.append(f"save {name!r}, load it as {other!r} on a fresh base")
    model = life.door.load(life.world.base(), _saved(life, name), other)
    found, expected = logits(model, batch), logits(life.alone([name]), batch)
    require_close("saved = loaded", found, expected, 1e-6)


def load(life: Life, rng: random.Random) -> None:
    """Load an adapter that was made elsewhere, under a new or a taken name."""
    if not life.known or life.merged or life.is_stacked:
        return
    kind = next(iter(life.known.values())).drawn.name
    source = Life(life.world_name, life.door_name, life.folder)
    drawn = draw(rng, life.world, kind) if rng.random() < 0.5 else rng.choice(list(life.known.values())).drawn
    try:
        source.model = source.door.add(source.model, drawn.build(), "default")
    except ValueError:
        return  # the architecture has no place for it
    randomize(source, "default", rng)
    source.remember("default", drawn)
    folder, name = _saved(source, "default"), rng.choice([*life.known, "loaded"])
    active = life.door.active(life.model)

    def action() -> None:
        life.door.load(life.model, folder, name)
        if life.door.name != "peft":
            life.door.activate(life.model, active)

    if life.attempt(f"load as {name!r}: {drawn}", action):
        life.known[name] = source.known["default"]


def load_damaged(life: Life, rng: random.Random) -> None:
    """A file that is not what was saved is refused, whichever way it comes in."""
    if not life.known or life.merged or life.is_stacked:
        return
    name, damage = rng.choice(list(life.known)), rng.choice(list(DAMAGES))
    folder = _saved(life, name)
    if DAMAGES[damage](folder, rng) is False:
        return
    # Under a taken name peft does not read the configuration; the weights are the adapter's own.
    new = "damaged" if damage in OF_CONFIGURATION else rng.choice((name, "damaged"))
    missing = (OSError,) if damage in MISSING else ()
    if rng.random() < 0.4:
        life.log.append(f"on a fresh base, load {name!r} with {damage}")
        fresh = Life(life.world_name, life.door_name, life.folder)
        done = fresh.attempt(f"load {damage}", lambda: fresh.door.load(fresh.model, folder, new), errors=missing)
    else:
        done = life.attempt(
            f"load {name!r} as {new!r} with {damage}", lambda: life.door.load(life.model, folder, new), errors=missing
        )
    if done:
        raise BrokenLawError(f"a file with {damage} is refused")


def _edit(change: Callable[[dict[str, torch.Tensor], random.Random], None]) -> Callable[[Path, random.Random], None]:
    def damage(folder: Path, rng: random.Random) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors, rng)
        save_file(tensors, path)

    return damage


def _edit_with_metadata(change: Callable) -> Callable[[Path, random.Random], None]:
    """As a tool that keeps the metadata would write it."""
    from safetensors import safe_open

    def damage(folder: Path, rng: random.Random) -> None:
        path = folder / "adapter_model.safetensors"
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        change(tensors, rng)
        save_file(tensors, path, metadata=metadata)

    return damage


def _own(tensors: dict[str, torch.Tensor]) -> list[str]:
    return sorted(key for key in tensors if "_experts." in key or "_router." in key)


def _drop(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    del tensors[rng.choice(_own(tensors))]


def _poison(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    tensors[rng.choice(_own(tensors))].view(-1)[-1] = rng.choice((float("nan"), float("inf")))


def _reshape(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    key = rng.choice(_own(tensors))
    tensors[key] = torch.zeros(*tensors[key].shape[:-1], tensors[key].shape[-1] + 1)


def _foreign(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    prefix = "base_model.model." if any(key.startswith("base_model.") for key in tensors) else ""
    tensors[prefix + rng.choice(FOREIGN)] = torch.zeros(3)


def _truncate(folder: Path, rng: random.Random) -> None:
    path = folder / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def _pickle(folder: Path, rng: random.Random) -> None:
    path = folder / "adapter_model.safetensors"
    torch.save(load_file(path), folder / "adapter_model.bin")
    path.unlink()


def _broken_json(folder: Path, rng: random.Random) -> None:
    path = folder / "adapter_config.json"
    text = path.read_text()
    path.write_text(rng.choice((text[: len(text) // 2], "", "[]", "null", "3", "[" * 5000, '{"peft_type": 3}', "{}")))


def _meaning(folder: Path, rng: random.Random) -> bool | None:
    """Change what the weights mean, and leave their shapes as they are."""
    path = folder / "adapter_config.json"
    fields = json.loads(path.read_text())
    name = rng.choice([name for name in MEANINGS if name in fields])
    value = MEANINGS[name](fields[name])
    if value is None or fields.get("method") == "ESFT":
        return False
    fields[name] = value
    path.write_text(json.dumps(fields))
    return None


FOREIGN = ("lm_head.weight", "model.norm.weight", "unknown.weight", "model.layers.0.input_layernorm.weight")
MEANINGS: dict[str, Callable] = {
    "lora_alpha": lambda value: value * 2 if isinstance(value, (int, float)) else None,
    "use_rslora": lambda value: not value,
    "routed_scaling_factor": lambda value: 3.0,
    "norm_topk_prob": lambda value: not value,
    "top_k": lambda value: value - 1 if isinstance(value, int) and value > 1 else None,
}
OF_CONFIGURATION = ("a broken adapter_config.json", "a field edited beside the weights", "no configuration")
MISSING = ("no weights", "no configuration", "no folder", "weights in a pickle")
DAMAGES: dict[str, Callable[[Path, random.Random], bool | None]] = {
    "a tensor left out": _edit(_drop),
    "a tensor left out and the metadata kept": _edit_with_metadata(_drop),
    "a value that is not finite": _edit_with_metadata(_poison),
    "a tensor of another shape": _edit_with_metadata(_reshape),
    "a foreign tensor": _edit_with_metadata(_foreign),
    "the end cut off": _truncate,
    "weights in a pickle": _pickle,
    "a broken adapter_config.json": _broken_json,
    "a field edited beside the weights": _meaning,
    "no weights": lambda folder, rng: (folder / "adapter_model.safetensors").unlink(),
    "no configuration": lambda folder, rng: (folder / "adapter_config.json").unlink(),
    "no folder": lambda folder, rng: shutil.rmtree(folder),
}
