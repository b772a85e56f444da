"""Two passes that must agree: every row of a training batch stands in it twice, and each draws its own experts.

    loss = (CE_1 + CE_2) / 2 + weight (KL(p_1 || p_2) + KL(p_2 || p_1)) / 2

THOR (Zuo et al., arXiv 2110.04260) and AdaMix (Wang et al., arXiv 2205.12410), whose experts are drawn at random and
come to stand for each other by it; THOR adds both cross entropies, which is twice this loss with half the weight. The
passes are one forward of a batch that is twice as long, so that any trainer runs it that takes a loss function.
Dropout makes the passes differ too (R-Drop, arXiv 2106.14448).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..layers import routed_layers
from ..messages import shown
from .checks import check_adapter, is_number

IGNORED = -100


def consistent(trainer: Any, weight: float = 1.0) -> Any:
    """Let a transformers or TRL trainer train with two passes that must agree. Call it before `trainer.train()`.

    Training batches hold every row twice, at twice the memory and time; evaluation stays as it is.

    Args:
        trainer: A trainer of a model whose outputs have `logits` of classes or tokens, and whose batches have
            `labels`. Its loss becomes the cross entropy of these with the term of agreement.
        weight: Of that term.

    Returns:
        The trainer.

    Raises:
        ValueError: It is no trainer, has a loss function of its own, flattens its rows, or the weight is no positive
            number; or an adapter draws once for all rows of a batch, so that both passes would be the same.
    """
    if not hasattr(trainer, "compute_loss_func") or not hasattr(trainer, "get_train_dataloader"):
        raise ValueError(
            f"consistent: {shown(type(trainer).__name__)} is no trainer of transformers or TRL with a loss function. "
            "Write moe_peft.integrations.consistent(trainer), or use twice and consistent_loss in a loop of your own."
        )
    if not is_number(weight) or not 0 < weight < float("inf"):
        raise ValueError(f"consistent: weight={shown(weight)} must be a positive number.")
    if trainer.compute_loss_func is not None:
        raise ValueError("consistent: the trainer has a compute_loss_func, which would be lost. Leave it out.")
    if getattr(trainer.args, "padding_free", False) or getattr(trainer.args, "packing", False):
        raise ValueError(
            "consistent: rows that are packed cannot be told apart. Set packing and padding_free to False."
        )
    check_adapter(trainer.model)
    check_draws(trainer.model)
    trainer.compute_loss_func = ConsistentLoss(weight, _predicts_next_tokens(trainer.model))
    trainer.get_train_dataloader = DoubledData(trainer)
    return trainer


def check_draws(model: nn.Module) -> None:
    """Refuse adapters for which a repeated row is no second pass.

    Args:
        model: A model with routed adapters.

    Raises:
        ValueError: A router draws once for all rows.
    """
    for layer in routed_layers(model):
        for name, router in layer.router.items():
            if router.one_draw:
                raise ValueError(
                    f"consistent: the router of the adapter {shown(name)} at {layer.place} draws once for all rows of "
                    "a batch, so that both passes would be the same. Let every sequence draw for itself "
                    "(router_args={'draw_for': 'sequence'})."
                )


def twice(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch whose rows all stand in it twice, the second time after all others.

    Args:
        batch: Keyword arguments of a model; tensors have rows as their first dimension, numbers stay.
    """
    return {
        key: torch.cat([value, value]) if isinstance(value, torch.Tensor) and value.dim() else value
        for key, value in batch.items()
    }


def consistent_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weight: float = 1.0,
    *,
    next_tokens: bool = True,
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """The loss of a batch whose rows all stand in it twice.

    Args:
        logits: (2B, L, V), or (2B, V) of classes of rows.
        labels: (2B, L) or (2B,); -100 where there is nothing to predict.
        weight: Of the term of agreement.
        next_tokens: Whether the label of a position is that of the one before it.
        num_items: Labels of all batches of the optimizer step, rows that stand twice counted twice; None for those of
            this batch.

    Returns:
        0-d, float32 or wider.

    Raises:
        ValueError: Rows do not stand twice, or there is one class.
    """
    rows = logits.shape[0]
    if rows % 2 or labels.shape[0] != rows or not torch.equal(*labels.chunk(2)):
        raise ValueError(
            f"consistent_loss: the {rows} rows of the batch are not each of {rows // 2} twice. Use twice(batch), "
            "without packing or flattened rows."
        )
    if logits.shape[-1] < 2:
        raise ValueError("consistent_loss: one class has no distribution that two passes could agree about.")
    if next_tokens:
        logits, labels = logits[:, :-1], labels[:, 1:]
    wide = torch.promote_types(logits.dtype, torch.float32)
    logp_RV, labels_R = logits.flatten(0, -2).to(wide).log_softmax(-1), labels.flatten().to(logits.device)
    count = (labels_R != IGNORED).sum().clamp_min(1) if num_items is None else num_items
    cross_entropy = F.nll_loss(logp_RV, labels_R, ignore_index=IGNORED, reduction="sum") / count
    first, second = logp_RV.chunk(2)
    counted = labels_R.chunk(2)[0] != IGNORED
    # KL(p || q) + KL(q || p) = sum (p - q) (log p - log q)
    apart = ((first.exp() - second.exp()) * (first - second)).sum(-1).masked_fill(~counted, 0.0).sum()
    return cross_entropy + weight * apart / count  # half of both, over half of the count


class ConsistentLoss:
    """A trainer's loss function: `consistent_loss` in training, the cross entropy where no gradient is wanted.

    Args:
        weight: Of the term of agreement.
        next_tokens: See `consistent_loss`.
    """

    def __init__(self, weight: float, next_tokens: bool) -> None:
        self.weight, self.next_tokens = weight, next_tokens

    def __call__(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The loss of a model's outputs.

        Args:
            outputs: With `logits`.
            labels: See `consistent_loss`.
            num_items_in_batch: See `consistent_loss`.

        Raises:
            ValueError: There are no logits or labels.
        """
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
        if logits is None or labels is None:
            raise ValueError(
                "consistent: the model's outputs have no logits, or the batch no labels, of which both passes could "
                "be compared. Use a loss that makes logits (use_liger_kernel=False), and data with labels."
            )
        if logits.requires_grad:
            count = num_items_in_batch
            if isinstance(count, torch.Tensor):
                count = count.to(logits.device)
            return consistent_loss(logits, labels, self.weight, next_tokens=self.next_tokens, num_items=count)
        if self.next_tokens:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED)


class DoubledData:
    """Stands in for a trainer's `get_train_dataloader`: its batches hold every row twice.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.original = trainer, trainer.get_train_dataloader

    def __call__(self) -> Any:
        """The trainer's own loader, whose collator gets every row twice."""
        own: Callable[..., Any] = self.trainer.data_collator
        self.trainer.data_collator = DoublingCollator(own)
        try:
            return self.original()
        finally:
            self.trainer.data_collator = own


class DoublingCollator:
    """Gives a collator every row twice, the second time after all others.

    Args:
        collator: Makes a batch of rows.
    """

    def __init__(self, collator: Callable[..., Any]) -> None:
        self.collator = collator

    def __call__(self, rows: list[Any]) -> Any:
        """Make a batch.

        Args:
            rows: Of the data.
        """
        return self.collator([*rows, *(dict(row) if isinstance(row, Mapping) else row for row in rows)])


def _predicts_next_tokens(model: nn.Module) -> bool:
    outer: Any = model
    inner = outer.get_base_model() if hasattr(model, "get_base_model") else outer
    return type(inner).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
