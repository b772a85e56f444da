"""The life of adapters on one model, and the laws that hold after each operation."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from moe_peft.layers import RoutedLayer

from . import snapshot
from .configurations import Drawn
from .doors import DOORS
from .laws import BrokenLawError, adapter_tensors, base_tensors, logits, require_close, require_same_tensors
from .worlds import WORLDS

EXACT, ROUNDED = 2e-5, 2e-3


@dataclass
class Known:
    """What is known of an adapter: its configuration as written, and its weights."""

    drawn: Drawn
    tensors: dict[str, torch.Tensor]


@dataclass
class Life:
    """A model with adapters beside what is known of them.

    Every forward is compared with that of a model that was made for it: the base, the active adapters added in the
    same order, and their known weights. Whatever an operation leaves behind shows as a difference.
    """

    world_name: str
    door_name: str
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="life")))

    def __post_init__(self) -> None:
        self.world, self.door = WORLDS[self.world_name], DOORS[self.door_name]
        self.base = self.world.base()
        self.model: nn.Module = self.world.base()
        self.known: dict[str, Known] = {}
        self.log: list[str] = []
        self.refused: list[str] = []
        self.was_merged = False
        self.checkpointing = False

    @property
    def active(self) -> list[str]:
        """Adapters that act, in the order in which they were added."""
        acting = {*self.door.active(self.model), *self.merged}
        return [name for name in self.known if name in acting]

    @property
    def merged(self) -> set[str]:
        """Adapters that are merged; a layer that differs from the others breaks the law of all or nothing."""
        layers = [module for module in self.model.modules() if isinstance(module, RoutedLayer)]
        merged = {name for layer in layers for name in layer.merged_adapters}
        for layer in layers:
            missing = [name for name in merged if name in layer.experts and name not in layer.merged_adapters]
            if missing:
                raise BrokenLawError("a merge is all or nothing", f"{missing} is not merged at {layer.place}")
        return merged

    @property
    def saves_modules(self) -> bool:
        """Whether an adapter has copies of whole modules; peft activates one such adapter at a time."""
        keys = [key for known in self.known.values() for key in known.tensors]
        return any("_experts.*" not in key and "_router.*" not in key for key in keys)

    def alike(self, drawn: Drawn) -> bool:
        """Whether a new adapter trains the same further modules as those that are known."""
        return all(known.drawn.further == drawn.further for known in self.known.values())

    @property
    def written(self) -> list[Drawn]:
        """Configurations of the known adapters."""
        return [known.drawn for known in self.known.values()]

    @property
    def is_stacked(self) -> bool:
        """Whether adapters of several types may wrap one another, of which the inner ones are saved by other names."""
        return len({known.drawn.name for known in self.known.values()}) > 1

    @property
    def exclusive(self) -> bool:
        """Whether one adapter acts at a time: each copies whole modules, or replaces the backbone's experts."""
        return self.saves_modules or any(known.drawn.name == "EsftConfig" for known in self.known.values())

    @property
    def tolerance(self) -> float:
        return ROUNDED if self.was_merged else EXACT

    def alone(self, names: list[str]) -> nn.Module:
        """A fresh model with only these adapters, all active."""
        model = self.world.base()
        with torch.random.fork_rng(devices=[]):
            for name in names:
                model = self.door.add(model, self.known[name].drawn.build(), name)
        if names:
            self.door.activate(model, names)
        for name in names:
            parameters = adapter_tensors(model, name)
            known = self.known[name].tensors
            if parameters.keys() != known.keys():
                raise BrokenLawError("an adapter has the tensors of its kind", str(parameters.keys() ^ known.keys()))
            for key, parameter in parameters.items():
                parameter.data.copy_(known[key])
        return model.eval()

    def remember(self, name: str, drawn: Drawn) -> None:
        """Take the model's weights of an adapter as the known ones."""
        tensors = {key: p.detach().clone() for key, p in adapter_tensors(self.model, name).items()}
        self.known[name] = Known(drawn, tensors)

    def attempt(self, text: str, action: Callable[[], object], *, may_refuse: bool = True, errors: tuple = ()) -> bool:
        """Run an operation that may be refused; then nothing must have changed.

        Args:
            text: The operation as a line of a program.
            action: What is run.
            may_refuse: Whether a ValueError or a TypeError is right.
            errors: Further errors that are.

        Returns:
            Whether it was done.
        """
        self.log.append(text)
        before = snapshot.take(self.model)
        try:
            action()
        except (ValueError, TypeError, *errors) as error:
            self.log[-1] += f"  # {type(error).__name__}: {str(error)[:200]}"
            self.refused.append(f"{text.split('(')[0]}: {error}")
            changed = snapshot.difference(before, snapshot.take(self.model))
            if changed:
                raise BrokenLawError("a refused operation changes nothing", changed) from error
            if not may_refuse:
                raise BrokenLawError("what is valid is not refused", str(error)) from error
            return False
        return True

    def check(self, rng: random.Random) -> None:
        """The laws that hold after every operation."""
        batch = self.world.batch(rng)
        active = self.active
        expected = logits(self.alone(active), batch)
        require_close("output equals that of the active adapters alone", self.output(batch), expected, self.tolerance)
        if not self.merged:
            found = base_tensors(self.model, self.known)
            require_same_tensors(
                "base weights stay", found, base_tensors(self.base, ()), self.tolerance if self.was_merged else 0.0
            )
        for name, known in self.known.items():
            require_same_tensors("weights of the adapter stay", adapter_tensors(self.model, name), known.tensors, 0.0)
        self._check_flags()

    def output(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return logits(self.model, batch)

    def _check_flags(self) -> None:
        acting = self.door.active(self.model)
        for name in self.known:
            for key, parameter in adapter_tensors(self.model, name).items():
                own = "_experts.*" in key or "_router.*" in key
                if own and name not in acting and parameter.requires_grad:
                    raise BrokenLawError("inactive adapters are frozen", f"{name}: {key}")
