"""How far a model is from another one on the same batches: loss, perplexity, divergence, and the first token."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..messages import shown

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Difference:
    """What one model loses against another.

    Attributes:
        loss_before: Mean loss per token of the model that is replaced.
        loss_after: Of the one that takes its place.
        divergence: Mean Kullback-Leibler divergence from the first's next tokens to the second's, in nats.
        agreement: Share of positions at which both have the same first token.
    """

    loss_before: float
    loss_after: float
    divergence: float
    agreement: float

    def metrics(self) -> dict[str, float]:
        """By name, with the perplexities, as a card shows them."""
        perplexities = {
            f"perplexity_{when}": math.exp(min(loss, 700.0))
            for when, loss in (("before", self.loss_before), ("after", self.loss_after))
        }
        return {**asdict(self), **perplexities}

    def __str__(self) -> str:
        """One line."""
        return (
            f"loss {self.loss_before:.4f} -> {self.loss_after:.4f}, divergence {self.divergence:.4g} nats, same first "
            f"token {self.agreement:.1%}"
        )


def checked_batches(batches: Iterable[Batch], caller: str) -> list[Batch]:
    """Batches that a model can be measured on more than once.

    Args:
        batches: Keyword arguments of the model, with token ids.
        caller: For the message.

    Raises:
        ValueError: There is none, or one has no token ids.
    """
    found = list(batches) if isinstance(batches, Iterable) else [batches]
    if not found or not all(isinstance(own, Mapping) and "input_ids" in own for own in found):
        raise ValueError(f"{caller}: batches={shown(found)} must be one or more dicts with input_ids.")
    return found


def labels_of(batch: Batch) -> torch.Tensor:
    """(B, S) labels of a batch; its own tokens but for padding where it has none.

    Args:
        batch: Keyword arguments of the model.
    """
    if "labels" in batch:
        return batch["labels"]
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    return ids if mask is None else ids.masked_fill(mask == 0, -100)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode for the time of a block.

    Args:
        model: Any.
    """
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def next_tokens(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Log probabilities of the next token where a label follows, and the labels.

    Args:
        model: A causal language model.
        batch: Keyword arguments of the model.

    Returns:
        (N, V) float32, and (N,) labels.

    Raises:
        ValueError: A probability is no number, of which a comparison would say anything.
    """
    given = {key: value for key, value in batch.items() if key != "labels"}
    logits, labels = model(**given).logits[:, :-1].float(), labels_of(batch)[:, 1:]
    keep = labels != -100
    said = F.log_softmax(logits[keep], dim=-1)
    if bool(said.isnan().any()):
        raise ValueError(
            f"The next tokens' probabilities of the {type(model).__name__} are not finite (NaN): weights of the model "
            "or of its adapter are broken, or overflow in their dtype. Load them from an earlier checkpoint, or with "
            "dtype=torch.float32."
        )
    return said, labels[keep]


class Comparison:
    """Adds up what two models say about the same tokens."""

    def __init__(self) -> None:
        self.sums, self.count = torch.zeros(4, dtype=torch.float64), 0

    def add(self, before: torch.Tensor, after: torch.Tensor, labels: torch.Tensor) -> None:
        """Count the tokens of a batch.

        Args:
            before: (N, V) log probabilities of one model.
            after: The same of the other.
            labels: (N,) tokens that come.
        """
        own = torch.stack(
            [
                F.nll_loss(before, labels, reduction="sum"),
                F.nll_loss(after, labels, reduction="sum"),
                # A token that the first rules out adds nothing, also where the second rules it out too.
                (before.exp() * (before - after)).masked_fill(before == -torch.inf, 0.0).sum(),
                (before.argmax(-1) == after.argmax(-1)).sum().to(before),
            ]
        )
        self.sums += own.double().cpu()
        self.count += len(labels)

    def result(self) -> Difference:
        """Means over all tokens.

        Raises:
            ValueError: There were none.
        """
        if not self.count:
            raise ValueError("The batches have no token with a label after the first. Give some texts.")
        return Difference(*(self.sums / self.count).tolist())
