"""Training passes of a living model, compared with those of a model that was made for them."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import nn

from .laws import BrokenLawError, adapter_tensors, gradients, require_same_tensors
from .life import Life

Batches = list[dict[str, torch.Tensor]]


def randomize(life: Life, name: str, rng: random.Random) -> None:
    """Weights with which the adapter changes the output, the router's among them."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    for parameter in adapter_tensors(life.model, name).values():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)


def train(life: Life, rng: random.Random) -> None:
    """Gradients equal those of the active adapters alone, whatever else the loop does; then take a step."""
    if not life.known or life.merged:
        return
    style = rng.choice(list(STYLES))
    batches = [life.world.batch(rng, labels=True) for _ in range(2)]
    seed, active = rng.randrange(1000), life.active
    life.log.append(f"train on two batches, {style}")
    found = gradients(life.model, batches, seed, STYLES[style])
    expected = gradients(life.alone(active), batches, seed) if active else {}
    if STYLES[style] not in (None, _together) and _is_random(life, active):
        expected = found  # further passes draw other dropouts
    require_same_tensors("gradients equal those of the active adapters alone", found, expected, life.tolerance * 10)
    for name, gradient in found.items():
        if not torch.isfinite(gradient).all():
            raise BrokenLawError("gradients are finite", name)
    _step(life, active)


def checkpoint(life: Life, rng: random.Random) -> None:
    """Switch gradient checkpointing on or off."""
    if not getattr(life.model, "supports_gradient_checkpointing", False) or not life.known:
        return
    if life.checkpointing:
        life.model.gradient_checkpointing_disable()
    else:
        reentrant = rng.random() < 0.5
        life.log.append(f"gradient_checkpointing_enable(use_reentrant={reentrant})")
        life.model.enable_input_require_grads()
        life.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    life.checkpointing = not life.checkpointing


def _is_random(life: Life, names: list[str]) -> bool:
    kinds = ("lora_dropout", "expert_dropout", "router_jitter_noise")
    configs = [life.known[name].drawn.build() for name in names]
    return any(getattr(config, kind, 0.0) for config in configs for kind in kinds)


def _step(life: Life, active: list[str]) -> None:
    for name in active:
        for parameter in adapter_tensors(life.model, name).values():
            if parameter.grad is not None:
                size = float(parameter.grad.abs().max())
                parameter.data -= 0.05 * parameter.grad / max(size, 1e-3)
        life.remember(name, life.known[name].drawn)
    life.model.zero_grad()


def _together(model: nn.Module, batches: Batches) -> None:
    sum(model(**batch).loss for batch in batches).backward()


def _look_between(model: nn.Module, batches: Batches) -> None:
    for batch in batches:
        loss = model(**batch).loss
        with torch.no_grad():
            model(**batches[0])
        loss.backward()


def _nested(model: nn.Module, batches: Batches) -> None:
    """A hook in the middle of the model calls the model."""
    blocks = [module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] == "1"]
    inside: list[bool] = []

    def probe(*_: object) -> None:
        if not inside:
            inside.append(True)
            with torch.no_grad():
                model(**{key: value[:1] for key, value in batches[0].items()})
            inside.clear()

    handle = blocks[0].register_forward_hook(probe)
    try:
        for batch in batches:
            model(**batch).loss.backward()
    finally:
        handle.remove()


def _inside_backward(model: nn.Module, batches: Batches) -> None:
    """The second batch is trained inside the backward of the first, as caches of gradients do."""
    first, second = batches
    output = model(**first)

    def train_second(_: torch.Tensor) -> None:
        with torch.enable_grad():
            model(**second).loss.backward()

    output.logits.register_hook(train_second)
    output.loss.backward()


def _accumulate_in_eval(model: nn.Module, batches: Batches) -> None:
    for batch in batches:
        model.eval()
        with torch.inference_mode():
            model(**batch)
        model.train()
        model(**batch).loss.backward()


STYLES: dict[str, Callable[[nn.Module, Batches], None] | None] = {
    "one by one": None,
    "in one backward": _together,
    "with a forward between forward and backward": _look_between,
    "with a forward inside the forward": _nested,
    "with a forward and a backward inside the backward": _inside_backward,
    "with evaluations between": _accumulate_in_eval,
}
