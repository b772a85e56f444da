"""Operations on adapters, each drawn from a number of its own, so that one can be left out of a program."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable

import torch

from moe_peft.layers import RoutedLayer

from . import faults, snapshot, training
from .configurations import draw
from .files import load, load_damaged, save_and_load
from .laws import BrokenLawError, logits, require_close
from .life import Life

NAMES = ("default", "a", "aa", "b-1", "A_2")
# Parts of weights' names, attributes of containers, and no names at all.
BAD_NAMES = ("", "a.b", "keys", "train", "type", "__base__", "base_layer", None, 3)


def add(life: Life, rng: random.Random) -> None:
    free = [name for name in NAMES if name not in life.known]
    if not free:
        return
    kinds = {known.drawn.name for known in life.known.values()}
    # peft keeps one type to a model, transformers stacks them.
    kind = next(iter(kinds), None) if life.door.name == "peft" else None
    name, drawn = rng.choice(free), draw(rng, life.world, kind)
    active = life.door.active(life.model)
    if len({drawn.name, *kinds}) > 1 and any(one.wraps_blocks for one in (drawn, *life.written)):
        return  # linear layers inside a wrapped block are nobody's default place
    if life.known and (drawn.copies_modules or life.saves_modules) and not life.alike(drawn):
        return  # peft saves, and transformers activates, adapters beside ones that train other modules with errors

    def action() -> None:
        life.model = life.door.add(life.model, drawn.build(), name)
        if life.door.name != "peft":
            alone = life.exclusive or drawn.copies_modules
            life.door.activate(life.model, [name] if alone else [*active, name])

    torch.manual_seed(rng.randrange(1000))
    if life.attempt(f"add {name!r}: {drawn}", action):
        training.randomize(life, name, rng)
        life.remember(name, drawn)


def add_badly(life: Life, rng: random.Random) -> None:
    kinds = {known.drawn.name for known in life.known.values()}
    # transformers takes no name, and an empty one, for "default".
    bad = BAD_NAMES if life.door.name == "peft" else tuple(name for name in BAD_NAMES if name)
    name, drawn = rng.choice((*bad, *life.known)), draw(rng, life.world, next(iter(kinds), None))

    def action() -> None:
        life.door.add(life.model, drawn.build(), name)

    if life.attempt(f"add under the bad name {name!r}: {drawn}", action):
        raise BrokenLawError("names that would lose weights are refused", repr(name))


def activate(life: Life, rng: random.Random) -> None:
    if life.known:
        names = list(life.known)
        names = [rng.choice(names)] if rng.random() < 0.6 or life.exclusive else names
        text = f"activate {names}"
        if life.attempt(text, lambda: life.door.activate(life.model, names)) and set(life.active) != set(names):
            raise BrokenLawError("activating makes exactly these active", f"{life.active} instead of {names}")


def disable(life: Life, rng: random.Random) -> None:
    if not life.known:
        return
    batch, merged = life.world.batch(rng), bool(life.merged)
    life.log.append("with the adapters disabled")
    with life.door.disabled(life.model):
        found = logits(life.model, batch)
    require_close("disabled adapters leave the base", found, logits(life.base, batch), life.tolerance)
    life.was_merged |= merged


def merge(life: Life, rng: random.Random) -> None:
    if not life.known or not life.door.merges:
        return
    names = None if rng.random() < 0.5 or life.exclusive else rng.sample(list(life.known), 1)
    safe = rng.random() < 0.5
    text = f"merge_adapter(adapter_names={names}, safe_merge={safe})"
    if life.attempt(text, lambda: life.model.merge_adapter(adapter_names=names, safe_merge=safe)):
        life.was_merged = True


def unmerge(life: Life, rng: random.Random) -> None:
    if life.known and life.door.merges:
        life.log.append("unmerge_adapter()")
        life.model.unmerge_adapter()


def delete(life: Life, rng: random.Random) -> None:
    if len(life.known) < 2:
        return  # without adapters peft's model cannot be called, with stock types neither
    name = rng.choice(list(life.known))
    if name in life.merged:
        unmerge(life, rng)
    if life.attempt(f"delete {name!r}", lambda: life.door.delete(life.model, name), may_refuse=False):
        del life.known[name]
        if name in life.door.active(life.model):
            raise BrokenLawError("a deleted adapter is not active", name)


def end(life: Life, rng: random.Random) -> None:
    """Unload a copy of the model, merged or not."""
    if not life.known or not life.door.merges:
        return
    batch, model, keep = life.world.batch(rng), copy.deepcopy(life.model), rng.random() < 0.5
    life.log.append(f"{'merge_and_unload' if keep else 'unload'}() of a copy")
    expected = logits(life.alone(life.active) if keep else life.base, batch)
    if not keep and life.saves_modules:
        return  # peft gives back trained copies of modules, not the base's
    before = snapshot.take(model)
    if not keep and life.merged:
        model.unmerge_adapter()
    try:
        model = model.merge_and_unload() if keep else model.unload()
    except ValueError:
        changed = snapshot.difference(before, snapshot.take(model))
        if changed:
            raise BrokenLawError("a refused merge changes nothing", changed) from None
        return
    require_close("unloaded = merged or base", logits(model, batch), expected, ROUNDED_END)
    if any(isinstance(module, RoutedLayer) for module in model.modules()):
        raise BrokenLawError("unloading leaves no adapter")


ROUNDED_END = 2e-3


def copied(life: Life, rng: random.Random) -> None:
    if rng.random() < 0.5 or life.checkpointing:  # transformers' hook of checkpointing cannot be pickled
        life.log.append("copy.deepcopy(model)")
        life.model = copy.deepcopy(life.model)
    else:
        life.log.append("pickle.loads(pickle.dumps(model))")
        life.model = pickle.loads(pickle.dumps(life.model))


def cast(life: Life, rng: random.Random) -> None:
    """A copy in 16 bits has routers in float32 and a finite output."""
    if not life.known:
        return
    life.log.append("copy.deepcopy(model).to(torch.bfloat16)")
    model, batch = copy.deepcopy(life.model).to(torch.bfloat16), life.world.batch(rng)
    for name, parameter in model.named_parameters():
        if "_router." in name and parameter.dtype != torch.float32:
            raise BrokenLawError("routers stay in float32", name)
    if not torch.isfinite(logits(model, batch)).all():
        raise BrokenLawError("a cast model has a finite output")


def mixed(life: Life, rng: random.Random) -> None:
    """One adapter per row."""
    if not life.known or life.door.name != "peft" or life.merged:
        return
    batch = life.world.batch(rng)
    names = [rng.choice([*life.known, "__base__"]) for _ in batch["input_ids"]]
    found: list[torch.Tensor] = []
    text = f"model(adapter_names={names})"
    if not life.attempt(text, lambda: found.append(logits(life.model, batch, adapter_names=names))):
        return
    for row, name in enumerate(names):
        expected = logits(life.alone([] if name == "__base__" else [name]), batch)[row]
        require_close("each row has its own adapter", found[0][row], expected, life.tolerance)


def generate(life: Life, rng: random.Random) -> None:
    if not life.world.generates:
        return
    batch = {key: value for key, value in life.world.batch(rng).items() if key != "labels"}
    settings = {"max_new_tokens": 3, "do_sample": False, "num_beams": rng.choice((1, 1, 2)), "pad_token_id": 0}
    life.log.append(f"generate({settings})")
    found = life.model.generate(**batch, **settings)
    if not life.was_merged and not torch.equal(found, life.alone(life.active).generate(**batch, **settings)):
        raise BrokenLawError("generation equals that of the active adapters alone")


OPERATIONS: dict[str, tuple[float, Callable[[Life, random.Random], None]]] = {
    "add": (4, add),
    "add_badly": (1, add_badly),
    "activate": (2, activate),
    "disable": (1, disable),
    "merge": (2, merge),
    "unmerge": (1, unmerge),
    "delete": (1, delete),
    "end": (1, end),
    "copied": (1, copied),
    "cast": (0.5, cast),
    "mixed": (1.5, mixed),
    "generate": (1, generate),
    "train": (4, training.train),
    "checkpoint": (0.5, training.checkpoint),
    "interrupted": (2, faults.interrupted),
    "save_and_load": (1.5, save_and_load),
    "load": (2, load),
    "load_damaged": (2, load_damaged),
}
