"""Passes that stop in the middle: nothing of them may reach the next pass."""

from __future__ import annotations

import random

import torch
from torch import nn

from .life import Life


class StoppedError(Exception):
    """Raised inside a pass."""


KINDS = (StoppedError, KeyboardInterrupt, SystemExit, MemoryError)


def interrupted(life: Life, rng: random.Random) -> None:
    """Stop a forward or a backward at some module, in training or evaluation."""
    kind, where = rng.choice(KINDS), rng.choice(("forward", "backward"))
    name, module = rng.choice(list(life.model.named_modules()))
    training = where == "backward" or rng.random() < 0.5
    batch = life.world.batch(rng, labels=True)
    life.log.append(f"{kind.__name__} in the {where} of {name or 'the model'}, training={training}")

    def stop(*_: object) -> None:
        raise kind("stopped")

    def stop_backward(_: nn.Module, __: tuple, output: object) -> None:
        if isinstance(output, torch.Tensor) and output.requires_grad:
            output.register_hook(stop)

    handle = module.register_forward_hook(stop if where == "forward" else stop_backward)
    life.model.train(training)
    try:
        output = life.model(**batch)
        if output.loss is not None and output.loss.requires_grad:
            output.loss.backward()
    except KINDS:
        pass
    finally:
        handle.remove()
        life.model.eval()
        life.model.zero_grad()
