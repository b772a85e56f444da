"""A task of clusters that an adapter on one linear layer learns, in a training loop of its own.

Inputs lie around some centers, and the wanted output is another linear map of the input around each. Gradients of the
router losses come with the backward pass, and `moe_peft.after_step` follows every optimizer step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

import moe_peft
from moe_peft import RoutedConfig, routed_layers
from moe_peft.types import Routing, TokenContext

WIDTH, TOKENS, CLUSTERS = 16, 256, 8


class Task:
    """Inputs around centers, each with a linear map of its own.

    Args:
        seed: Of centers, maps and inputs.
        skew: How much more often each center comes than the next.
    """

    def __init__(self, seed: int, skew: float = 1.0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.centers = 2 * self._normal(CLUSTERS, WIDTH)
        self.maps = self._normal(CLUSTERS, WIDTH, WIDTH) / math.sqrt(WIDTH)
        self.chances = torch.tensor([skew**-c for c in range(CLUSTERS)])

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, D) inputs and the outputs that are wanted."""
        which = torch.multinomial(self.chances, TOKENS, replacement=True, generator=self.generator)
        x = self.centers[which] + 0.5 * self._normal(TOKENS, WIDTH)
        return x, torch.einsum("td,tod->to", x, self.maps[which])

    def between(self) -> torch.Tensor:
        """(T, D) inputs half way between two centers, which belong to neither."""
        pairs = torch.randint(CLUSTERS, (TOKENS, 2), generator=self.generator)
        return self.centers[pairs].mean(1) + 0.5 * self._normal(TOKENS, WIDTH)


def adapted(seed: int, **fields: Any) -> nn.Module:
    """A linear layer with an adapter; the router losses are those that are named alone."""
    torch.manual_seed(seed)
    config = RoutedConfig(**{"target_modules": ["0"], "r": 4, "router_aux_loss_coef": 0.0, **fields})
    return get_peft_model(nn.Sequential(nn.Linear(WIDTH, WIDTH)), config)


def train(
    model: nn.Module, task: Task, steps: int, after: Callable[[], None] = lambda: None, rate: float = 1e-2
) -> None:
    """AdamW on the task, with what parts do after each step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    for _ in range(steps):
        x, wanted = task.batch()
        nn.functional.mse_loss(model(x), wanted).backward()
        optimizer.step()
        optimizer.zero_grad()
        moe_peft.after_step(model)
        after()
    model.eval()


@torch.no_grad()
def decided(model: nn.Module, x: torch.Tensor) -> Routing:
    """What the adapter's router decides about tokens."""
    (layer,) = routed_layers(model)
    routing: Routing = layer.router["default"](x, TokenContext())
    return routing
