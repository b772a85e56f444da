"""Sums what expert scores are made of: slots and combine weights of each expert, over tokens and over samples.

Slots are counted as integers and weights are summed in float64 on the CPU, in the order of the tokens, so that the
same forwards always give the same scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..forward.batch import batch_shape, segments_of, two_dimensional
from ..forward.forward_pass import ForwardPass
from ..forward.joined_losses import ForwardLosses
from ..forward.processes import sum_over_processes
from ..place import MoeLayer
from ..types import LossScale
from .scores import LayerScores

MASKS = ("all", "completion")


@dataclass(frozen=True)
class ScoredTokens:
    """Which tokens of a batch count, and for which sample.

    Attributes:
        counts: (T,) bool.
        samples: (T,) int64 row, or document of packed rows, that a token belongs to.
        num_samples: S.
    """

    counts: torch.Tensor
    samples: torch.Tensor
    num_samples: int

    @property
    def lengths(self) -> torch.Tensor:
        """(S,) int64 number of tokens that count in each sample."""
        return torch.bincount(self.samples[self.counts], minlength=self.num_samples)


def scored_tokens(batch: Mapping[str, Any], score_mask: str, limit: int | None) -> ScoredTokens:
    """Read from a batch which of its tokens are scored.

    Args:
        batch: Tensors on the CPU: `input_ids` or `inputs_embeds`, and what tells padding (`attention_mask`), documents
            (`seq_idx`, `position_ids`) and completions (`completion_mask`, `labels`) apart.
        score_mask: "all", or "completion" for tokens of completions alone.
        limit: Count the first tokens alone, this many; None counts all.

    Raises:
        ValueError: The batch does not tell.
    """
    shape = batch_shape(dict(batch))
    if shape is None:
        raise ValueError(f"A batch has no input_ids of shape (B, L), it has {sorted(batch)}. Give tokenized batches.")
    mask = batch.get("attention_mask")
    if mask is not None and two_dimensional(mask) is None:
        raise ValueError(
            f"The attention_mask of a batch has the shape {tuple(mask.shape)}, which does not tell padding. Give the "
            "(B, L) mask, or leave it out where no token is padding."
        )
    losses = ForwardLosses(LossScale())
    forward_pass = ForwardPass(False, losses, shape, attention_mask=mask, segments=segments_of(dict(batch)))
    context = forward_pass.tokens(shape, torch.device("cpu"))
    assert context.sequences is not None
    counts_T = torch.ones(shape[0] * shape[1], dtype=torch.bool) if context.valid is None else context.valid
    if score_mask == "completion":
        counts_T = counts_T & _completions(batch, shape).reshape(-1)
    if limit is not None:
        counts_T = counts_T & (counts_T.cumsum(0) <= limit)
    return ScoredTokens(counts_T, context.sequences, context.num_sequences)


def _completions(batch: Mapping[str, Any], shape: tuple[int, int]) -> torch.Tensor:
    for name in ("completion_mask", "labels"):
        value = two_dimensional(batch.get(name))
        if value is not None and tuple(value.shape) == shape:
            return value != (0 if name == "completion_mask" else -100)
    raise ValueError(
        f"score_mask='completion' needs a column completion_mask, or labels that are -100 at the prompt, of shape "
        f"{shape}; the batch has {sorted(batch)}. Add one, or use score_mask='all'."
    )


class ExpertTally:
    """Running sums over batches, for every sparse layer of a model.

    Args:
        layers: The layers.
    """

    def __init__(self, layers: Iterable[MoeLayer]) -> None:
        self.num_experts = {layer.index: layer.num_experts for layer in layers}
        # Layer -> (E,) slots and summed weights over tokens, the same as sums of the samples' means, and (1,) slots
        # of all tokens together.
        self.slots = {index: torch.zeros(count, dtype=torch.int64) for index, count in self.num_experts.items()}
        self.weights = {index: torch.zeros(count, dtype=torch.float64) for index, count in self.num_experts.items()}
        self.mean_slots = {index: torch.zeros(count, dtype=torch.float64) for index, count in self.num_experts.items()}
        self.mean_weights = {index: mean.clone() for index, mean in self.mean_slots.items()}
        self.total_slots = dict.fromkeys(self.num_experts, 0)
        self.num_tokens = 0
        self.num_samples = 0

    def add_tokens(self, tokens: ScoredTokens) -> None:
        """Count the tokens and samples of a batch."""
        self.num_tokens += int(tokens.counts.sum())
        self.num_samples += int((tokens.lengths > 0).sum())

    def add(self, layer: int, index_TK: torch.Tensor, weights_TK: torch.Tensor, tokens: ScoredTokens) -> None:
        """Add what the tokens of a batch use in one layer.

        Args:
            layer: Index of the decoder layer.
            index_TK: (T, K) int64 experts; E and above mark a slot without one.
            weights_TK: (T, K) float64 combine weights.
            tokens: Which of the T tokens count.

        Raises:
            ValueError: A weight is not finite.
        """
        num_experts, lengths_S = self.num_experts[layer], tokens.lengths
        counted_TK = tokens.counts[:, None].expand_as(index_TK)
        if not torch.isfinite(weights_TK[counted_TK]).all():
            raise ValueError(
                f"The routing weights of layer {layer} are not finite: the model's activations overflow. Load it with "
                "dtype=torch.bfloat16 or float32."
            )
        used_TK = counted_TK & (index_TK < num_experts) & (weights_TK > 0)
        place = (tokens.samples[:, None] * num_experts + index_TK)[used_TK]
        size = tokens.num_samples * num_experts
        slots_SE = torch.bincount(place, minlength=size).view(-1, num_experts)
        weights_SE = torch.bincount(place, weights_TK[used_TK], minlength=size).view(-1, num_experts)
        per_token_S1 = 1.0 / lengths_S.clamp(min=1).double()[:, None]
        self.slots[layer] += slots_SE.sum(0)
        self.weights[layer] += weights_SE.sum(0)
        self.mean_slots[layer] += (slots_SE * per_token_S1).sum(0) / index_TK.shape[1]
        self.mean_weights[layer] += (weights_SE * per_token_S1).sum(0)
        self.total_slots[layer] += int(lengths_S.sum()) * index_TK.shape[1]

    def join(self, device: torch.device) -> None:
        """Add the sums of all processes.

        Args:
            device: Where the processes' backend takes tensors from.
        """
        layers = list(self.num_experts)
        sums = [self.slots, self.weights, self.mean_slots, self.mean_weights]
        totals = [self.num_tokens, self.num_samples, *self.total_slots.values()]
        flat = [own[layer] for own in sums for layer in layers] + [torch.tensor(totals)]
        # float64 counts exactly to 2^53.
        joined = [part.cpu() for part in sum_over_processes([part.double().to(device) for part in flat])]
        parts = iter(joined)
        for own in sums:
            for layer in layers:
                own[layer] = next(parts).to(own[layer].dtype)
        self.num_tokens, self.num_samples, *slots = (int(total) for total in next(parts))
        self.total_slots = dict(zip(layers, slots, strict=True))

    def scores(self, layer: int, expert_parameters: int) -> LayerScores:
        """The scores of one layer.

        Args:
            layer: Index of the decoder layer.
            expert_parameters: Parameters of one of its experts.
        """
        values = {
            ("token", "token"): self.slots[layer].double() / self.total_slots[layer],
            ("gate", "token"): self.weights[layer] / self.num_tokens,
            ("token", "sample"): self.mean_slots[layer] / self.num_samples,
            ("gate", "sample"): self.mean_weights[layer] / self.num_samples,
        }
        return LayerScores(values, self.total_slots[layer] // self.num_tokens, expert_parameters)
