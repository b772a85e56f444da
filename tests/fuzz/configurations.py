"""Random configurations that fit an architecture, written as a class name and its arguments."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import moe_peft
from moe_peft.config.config import MoeConfig
from moe_peft.experts import EXPERTS
from moe_peft.ops import IMPLEMENTATIONS
from moe_peft.routers import GATES, SCORERS

from .worlds import World

# The batches of the worlds bring no groups.
WITHOUT_GROUPS = [name for name, part in SCORERS.items() if "groups" not in part.context_needs]


class Drawn(NamedTuple):
    """A configuration as it is written in a program."""

    name: str
    fields: dict[str, Any]

    def build(self) -> MoeConfig:
        """The configuration."""
        return getattr(moe_peft, self.name)(**self.fields)

    @property
    def copies_modules(self) -> bool:
        """Whether peft lets only one such adapter act at a time."""
        copies = ("modules_to_save", "trainable_token_indices", "train_router")
        return self.name == "EsftConfig" or "SEQ_CLS" in self.fields.values() or any(n in self.fields for n in copies)

    @property
    def wraps_blocks(self) -> bool:
        """Whether whole blocks or experts modules are wrapped, and the linear layers in them with them."""
        return self.name in ("PerftConfig", "EsftConfig", "ExpertLoraConfig") or "wraps" in self.fields

    @property
    def further(self) -> dict[str, Any]:
        """What is trained beside the adapter itself."""
        names = ("modules_to_save", "trainable_token_indices", "train_router")
        further = {name: self.fields[name] for name in names if name in self.fields}
        return {**further, **({"experts": self.fields["experts"]} if "train_router" in further else {})}

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{name}={value!r}' for name, value in self.fields.items())})"


def draw(rng: random.Random, world: World, kind: str | None = None) -> Drawn:
    """A configuration that can be built, of a class that fits the architecture.

    Args:
        rng: Source of choices.
        world: The architecture.
        kind: Name of the class; None draws one of those that fit.
    """
    names = [name for name in KINDS if fits(name, world)]
    for _ in range(50):
        name = kind or rng.choice(names)
        fields = {"task_type": world.task_type, **KINDS[name](rng, world)}
        drawn = Drawn(name, fields)
        try:
            drawn.build()
        except ValueError:
            continue  # a combination that is refused
        return drawn
    raise AssertionError(f"no valid {name} in 50 draws, the last is {drawn}")


def fits(name: str, world: World) -> bool:
    """Whether an architecture has what a class wraps."""
    has_experts = world.num_experts > 0
    return {"EsftConfig": has_experts, "ExpertLoraConfig": has_experts, "PerftConfig": world.has_blocks}.get(
        name, True
    )


def _shared(rng: random.Random, world: World) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "num_experts": rng.choice((1, 2, 3, 4)),
        "init_weights": rng.choice((True, False, False)),
    }
    _maybe(rng, fields, 0.3, lora_dropout=0.25)
    _maybe(rng, fields, 0.3, use_rslora=True)
    _maybe(rng, fields, 0.3, lora_alpha=rng.choice((1, 3.5, 16)))
    _maybe(rng, fields, 0.2, router_z_loss_coef=0.01)
    _maybe(rng, fields, 0.2, router_jitter_noise=0.1)
    _maybe(rng, fields, 0.2, routed_scaling_factor=rng.choice((0.5, 2)))
    _maybe(rng, fields, 0.2, load_balancing_scope=rng.choice(("micro_batch", "global_batch", "accumulation_window")))
    _maybe(rng, fields, 0.2, layers_to_transform=[1])
    return {**fields, "r": rng.choice((1, 2, 3)), **_extras(rng, world)}


def _extras(rng: random.Random, world: World) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if world.name == "llama":
        _maybe(rng, fields, 0.1, modules_to_save=["lm_head"])
        _maybe(rng, fields, 0.1, trainable_token_indices=[3, 5])
    return fields


def _targets(rng: random.Random, world: World) -> dict[str, Any]:
    chosen = rng.choice((None, None, "all-linear", "some"))
    if chosen == "some":
        return {"target_modules": sorted(rng.sample(world.linears, rng.randint(1, min(2, len(world.linears)))))}
    return {} if chosen is None else {"target_modules": chosen}


def _top_k(rng: random.Random, num_experts: int) -> dict[str, Any]:
    return {"top_k": rng.randint(1, num_experts), **({"norm_topk_prob": True} if rng.random() < 0.3 else {})}


def _maybe(rng: random.Random, fields: dict[str, Any], chance: float, **more: Any) -> None:
    if rng.random() < chance:
        fields.update(more)


def _loramoe(rng: random.Random, world: World) -> dict[str, Any]:
    return {**_shared(rng, world), **_targets(rng, world)}


def _molora(rng: random.Random, world: World) -> dict[str, Any]:
    fields = {**_shared(rng, world), **_targets(rng, world)}
    return {**fields, **(_top_k(rng, fields["num_experts"]) if rng.random() < 0.5 else {})}


def _sira(rng: random.Random, world: World) -> dict[str, Any]:
    fields = {**_shared(rng, world), **_targets(rng, world)}
    _maybe(rng, fields, 0.5, capacity_factor=rng.choice((None, 0.5, 1.0)))
    _maybe(rng, fields, 0.5, expert_dropout=0.0)
    return {**fields, **_top_k(rng, fields["num_experts"])}


def _routed(rng: random.Random, world: World) -> dict[str, Any]:
    fields = _shared(rng, world)
    fields["router"] = rng.choice(("dense", "top_k", "top_k", "capacity", "constant"))
    fields["experts"] = rng.choice(("low_rank", *EXPERTS))
    if fields["router"] in ("top_k", "capacity"):
        fields.update(_top_k(rng, fields["num_experts"]))
    if fields["experts"] == "bottleneck":
        for name in ("lora_alpha", "use_rslora"):
            fields.pop(name, None)
        _maybe(rng, fields, 0.5, activation=rng.choice(("relu", "gelu")))
    _maybe(rng, fields, 0.3, experts_implementation=rng.choice(list(IMPLEMENTATIONS)))
    _maybe(rng, fields, 0.3, scorer=rng.choice(WITHOUT_GROUPS), gate=rng.choice(list(GATES)))
    _maybe(rng, fields, 0.3, router_aux_loss_coef=0.3)
    wraps = rng.choice(("linear", "linear", "block")) if world.has_blocks else "linear"
    return {**fields, **(_targets(rng, world) if wraps == "linear" else {"wraps": wraps})}


def _mov(rng: random.Random, world: World) -> dict[str, Any]:
    fields = {**_shared(rng, world), **_targets(rng, world)}
    for name in ("r", "lora_alpha", "lora_dropout", "use_rslora", "routed_scaling_factor"):
        fields.pop(name, None)
    _maybe(rng, fields, 0.3, router_input="hidden")
    _maybe(rng, fields, 0.3, router_granularity="token")
    return {**fields, **(_top_k(rng, fields["num_experts"]) if rng.random() < 0.4 else {})}


def _perft(rng: random.Random, world: World) -> dict[str, Any]:
    variant = rng.choice("RRDSE" if world.num_experts else "RRDS")
    fields = {**_shared(rng, world), "variant": variant}
    for name in ("router_z_loss_coef", "router_jitter_noise") if variant != "R" else ():
        fields.pop(name, None)
    if variant in "SE":
        fields.pop("num_experts")
    _maybe(rng, fields, 0.5, lora_dropout=0.0)
    return {**fields, **(_top_k(rng, fields["num_experts"]) if variant == "R" else {})}


def _esft(rng: random.Random, world: World) -> dict[str, Any]:
    layers = rng.choice((("1",), ("0", "1"))) if world.name != "deepseek_v2" else ("1", "2")
    count = rng.randint(1, world.num_experts)
    fields: dict[str, Any] = {
        "experts": {layer: sorted(rng.sample(range(world.num_experts), count)) for layer in layers}
    }
    if rng.random() < 0.4:
        fields.update(expert_adapter="lora", r=rng.choice((1, 2)), init_weights=rng.choice((True, False)))
    _maybe(rng, fields, 0.2, train_router=True)
    return fields


def _expert_lora(rng: random.Random, world: World) -> dict[str, Any]:
    fields: dict[str, Any] = {"r": rng.choice((1, 2, 3)), "init_weights": rng.choice((True, False))}
    _maybe(rng, fields, 0.3, lora_dropout=0.25)
    _maybe(rng, fields, 0.3, use_rslora=True)
    _maybe(rng, fields, 0.3, lora_alpha=rng.choice((1, 3.5, 16)))
    _maybe(rng, fields, 0.3, target_matrices=[rng.choice(("gate_up", "down"))])
    _maybe(rng, fields, 0.4, target_modules=sorted(rng.sample(world.linears, 2)))
    if rng.random() < 0.5:
        fields["experts"] = _esft(rng, world)["experts"]
    return fields


KINDS = {
    "LoraMoeConfig": _loramoe,
    "MoloraConfig": _molora,
    "SiraConfig": _sira,
    "RoutedConfig": _routed,
    "MovConfig": _mov,
    "PerftConfig": _perft,
    "EsftConfig": _esft,
    "ExpertLoraConfig": _expert_lora,
}
