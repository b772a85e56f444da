"""Experts averaged to one LoRA of their own rank, by the adapter's weights w, which are the same for every token.

    A = sum_e w_e A_e / sum_e w_e,   B = s sum_e w_e B_e

AdaMix (Wang et al., arXiv 2205.12410): experts that were drawn at random in training stand for each other, so that
their mean is one adapter of the size of a single expert. It equals the mixture, s sum_e w_e B_e A_e, where all share
A or B; elsewhere it is another matrix, and how far it is from the mixture is told for every place.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel

from ..files import check_free, write_text
from ..layers import RoutedLayer
from ..messages import shown
from .checks import check_finite_adapter, check_peft_model
from .export_lora import write_lora
from .merge_for_task import decided
from .other_experts import routed_by_name

# Share of a place's mixture up to which the mean counts as equal to it: rounding.
EXACT = 1e-5


@dataclass(frozen=True)
class Averaged:
    """What was written.

    Attributes:
        rank: The largest of its places.
        lost: Place -> norm of the difference to the mixture, over that of the mixture; zero where both are zero.
    """

    rank: int
    lost: dict[str, float]

    @property
    def exact(self) -> bool:
        """Whether the LoRA equals the mixture at every place, to rounding."""
        return max(self.lost.values()) <= EXACT

    def __str__(self) -> str:
        """One line."""
        if self.exact:
            return f"rank {self.rank}: equal to the mixture of the experts"
        mean, worst = sum(self.lost.values()) / len(self.lost), max(self.lost.values())
        return (
            f"rank {self.rank}: approximate, off the mixture of the experts by {mean:.1%} of its norm in the mean of "
            f"{len(self.lost)} places, {worst:.1%} at most"
        )


@torch.no_grad()
def average_experts(
    model: PeftModel, folder: str | Path, adapter_name: str = "default", *, task: int | None = None
) -> Averaged:
    """Write the mean of an adapter's experts as a stock LoRA of an expert's rank.

    Args:
        model: A model with the adapter, whose weights are the same for every token outside of training; it is not
            changed.
        folder: The folder to make.
        adapter_name: Which adapter.
        task: Task whose mean is written, of an adapter whose router reads the task alone.

    Returns:
        How far the LoRA is from the mixture; print it.

    Raises:
        TypeError: The model is no `PeftModel`.
        ValueError: The adapter's weights depend on the token, or its experts are no pairs; nothing has been written.
    """
    check_free(folder)
    check_peft_model(model, "average_experts")
    layers = routed_by_name(model, adapter_name)
    check_finite_adapter(model, adapter_name, "average_experts")
    with decided(model, adapter_name, task):
        other = next((layer for layer in layers.values() if not layer.supports_lora_conversion(adapter_name)), None)
        if other is not None:
            raise ValueError(
                f"average_experts: the weights of the adapter {shown(adapter_name)} at {other.place} depend on the "
                "token, or its experts are no pairs beside a linear layer, so that there is no mean. Distil it to one "
                "LoRA (distil_to_lora); an adapter that routes by task has a mean for each of them (task=0)."
            )
        pairs = {name: own.get_mean_factors(adapter_name) for name, own in layers.items()}  # type: ignore[operator]
        lost = {name: _lost(layer, adapter_name, pairs[name]) for name, layer in layers.items()}
    result = Averaged(max(len(A) for A, _ in pairs.values()), lost)
    with write_lora(model, folder, adapter_name, pairs) as growing:
        write_text(growing / "README.md", _card(model, adapter_name, result))
    return result


def _lost(layer: RoutedLayer, adapter_name: str, pair: tuple[torch.Tensor, torch.Tensor]) -> float:
    """|B A - sum_e w_e D_e| over |sum_e w_e D_e|, of the factors alone."""
    A_RD, B_OR = (factor.double() for factor in layer.get_delta_factors(adapter_name))  # type: ignore[operator]
    A_rD, B_Or = (factor.double() for factor in pair)
    whole = _squared(A_RD, B_OR)
    apart = _squared(torch.cat([A_RD, A_rD]), torch.cat([B_OR, -B_Or], dim=1))
    return (apart / whole) ** 0.5 if whole > 0 else float(apart > 0)


def _squared(A_RD: torch.Tensor, B_OR: torch.Tensor) -> float:
    """Squared norm of B A, never below zero."""
    return max(float(((B_OR.T @ B_OR) * (A_RD @ A_RD.T)).sum()), 0.0)


def _card(model: PeftModel, adapter_name: str, result: Averaged) -> str:
    own = model.peft_config[adapter_name]
    places = "\n".join(f"| {place} | {share:.2%} |" for place, share in result.lost.items())
    return (
        f"---\nbase_model: {own.base_model_name_or_path}\nlibrary_name: peft\n---\n\n# The mean of several experts\n\n"
        f"A stock LoRA, the mean of the experts of a routed adapter: {result}.\n\n"
        f"| place | off the mixture, of its norm |\n|---|---|\n{places}\n"
    )
