"""The scale at which a mixture learns at the pace of LoRA with `lora_alpha` = 2 r, for any experts, top-k and router.

    alpha = 2 r (1 / q)^(2/3) (E / m)^(1/3)        q^2 = mean over tokens and experts of g_te^2,  m = mean_t sum_e g_te

A gate g scales what an expert adds. AdamW divides by the size of a gradient, so that the up matrix of an expert moves
alike whatever its gate, and what a token gets of the step is g. Where the gradients of an expert's tokens add up, a
mixture of E experts of rank r keeps pace with one LoRA of rank E r at a scale of 2 E / m; where they cancel but for
their noise, at 2 / q. Real gradients are in between; the exponents are fitted. Sixty steps gain 1.26 of LoRA's with
two of eight experts, 1.56 with two of 32, and 0.85 where their weights sum to one (docs/learning_rates.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..config.config import BACKBONE
from ..config.fields import MixtureConfig, RoutedMoeConfig
from ..config.ranges import LARGEST
from ..types import TokenContext
from .build import build_router

# Scale of LoRA that the pace is of: lora_alpha / r.
LORA_SCALE = 2.0
# Exponent of the part of gradients that cancels.
NOISE = 2 / 3
# Width and number of the inputs that a router is asked about; of many experts fewer tokens are enough.
WIDTH, TOKENS, SCORES = 64, 512, 2**16
# Beyond this number of experts their weights are taken for even ones.
MOST = 2**12
# What files hold of kinds of experts that have no scale.
WITHOUT_SCALE = 8


@dataclass
class PacedConfig(RoutedMoeConfig):
    """Fields of a mixture whose scale is not a paper's, so that it follows from experts, top-k and router."""

    lora_alpha: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "The routed sum is times lora_alpha / r. None: the value at which these experts, top-k and router "
            "learn at the pace of LoRA with lora_alpha = 2 r, which is filled in and saved."
        },
    )

    def __post_init__(self) -> None:
        self._paced = self.lora_alpha is None
        super().__post_init__()
        # Only of a configuration that has passed its checks can a router be made.
        if self._paced and "scaling" in self.kind.fields:
            self.lora_alpha = pace_alpha(self)

    def _fill_in(self) -> None:
        super()._fill_in()
        if self.lora_alpha is None:
            self.lora_alpha = WITHOUT_SCALE


def pace_alpha(config: MixtureConfig) -> float:
    """The `lora_alpha` at which a configuration learns at LoRA's pace, to two digits.

    Args:
        config: Valid but for its `lora_alpha`.

    Returns:
        2 r where the weights are one, or the backbone's own.
    """
    if config.router == BACKBONE:
        return LORA_SCALE * config.r
    size, total = _start(config)
    scale = LORA_SCALE * size**-NOISE * (config.num_experts / total) ** (1 - NOISE)
    return float(f"{min(scale, LARGEST / 2) * config.r:.2g}")


def _start(config: MixtureConfig) -> tuple[float, float]:
    """q, the root mean square of the weights of a new router, and m, their sum for a token."""
    E = config.num_experts
    gates_TE = None if E > MOST else _gates(config)
    if gates_TE is None or not gates_TE.square().sum() > 0:
        slots = getattr(config, "top_k", None) or E
        total = 1.0 if getattr(config, "norm_topk_prob", False) else slots / E
        return total / (slots * E) ** 0.5, total
    return float(gates_TE.square().mean().sqrt()), float(gates_TE.sum(-1).mean())


@torch.no_grad()
def _gates(config: MixtureConfig) -> torch.Tensor | None:
    """(T, E) weights that a new router gives in evaluation; None where it reads what is not there yet, or fails."""
    E = config.num_experts
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(0)
        router = build_router(config, WIDTH, E).eval()
        if router.reads != "input" or router.context_needs - {"sequences"}:
            return None
        x_TD = torch.randn(max(1, min(TOKENS, SCORES // E)), WIDTH, dtype=torch.float32)
        try:
            with torch.autocast("cpu", enabled=False):
                gates_TE = router(x_TD, TokenContext()).gate_matrix()
        except Exception:  # of a router from outside, which is told where it is built for a model
            return None
    return gates_TE.float() / config.routed_scaling_factor
