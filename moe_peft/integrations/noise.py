"""Switches off what perturbs training passes, where a trainer compares passes of a model with each other.

A preference or policy loss is a function of log-probabilities of the policy over those of a reference, or of the
policy itself a few steps ago. Noise that one pass has and the other has not is taken for a difference of models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..layers import RoutedLayer
from ..messages import warn
from .groups import routed_configs

# Fields of a configuration that perturb training passes alone, and their values that do not.
NOISE = {"lora_dropout": 0.0, "expert_dropout": 0.0, "router_jitter_noise": 0.0, "capacity_factor": None}


def compares_passes(trainer: Any) -> bool:
    """Whether a trainer's loss compares passes of its model with those of a reference, or of its own past.

    Such trainers keep a reference model, or None where the model with its adapter off serves, and those without one
    ask for a model without dropout.

    Args:
        trainer: A trainer of transformers or TRL.
    """
    return hasattr(trainer, "ref_model") or bool(getattr(trainer.args, "disable_dropout", False))


def keeps_dropout(args: Any) -> bool:
    """Whether a trainer was told to keep dropouts that it would switch off.

    Args:
        args: The trainer's arguments.
    """
    defaults = {own.name: own.default for own in dataclasses.fields(args)} if dataclasses.is_dataclass(args) else {}
    return defaults.get("disable_dropout") is True and args.disable_dropout is False


def say_what_is_off(trainer: Any) -> None:
    """Warn of settings of the adapters that have no effect in a trainer which compares passes.

    Args:
        trainer: The trainer.
    """
    if not compares_passes(trainer):
        return
    dropouts = keeps_dropout(trainer.args)
    found = {
        name: getattr(config, name)
        for config in routed_configs(trainer.model)
        for name, off in NOISE.items()
        if getattr(config, name, off) != off and not (dropouts and name.endswith("_dropout"))
    }
    if found:
        settings = ", ".join(f"{name}={value}" for name, value in found.items())
        warn(
            f"{type(trainer).__name__} compares passes of the model with each other, in which noise would count as a "
            f"difference: {settings} of the adapter has no effect in it."
        )


@contextmanager
def without_noise(model: nn.Module, *, dropouts: bool = True) -> Iterator[None]:
    """For a while, let training passes of routed adapters compute what evaluation does.

    Args:
        model: A model with routed adapters.
        dropouts: Whether to switch off dropouts on the experts' input, beside jitter, capacity and dropped gates.
    """
    layers = [module for module in model.modules() if isinstance(module, RoutedLayer)]
    routers = [router for layer in layers for router in layer.router.values()]
    banks = [bank for layer in layers for bank in layer.experts.values()] if dropouts else []
    dropped = [(module, module.p) for bank in banks for module in bank.modules() if isinstance(module, nn.Dropout)]
    before = [(router, router.perturbs_training) for router in routers]
    try:
        for router in routers:
            router.perturbs_training = False
        for module, _ in dropped:
            module.p = 0.0
        yield
    finally:
        for router, perturbs in before:
            router.perturbs_training = perturbs
        for module, probability in dropped:
            module.p = probability
