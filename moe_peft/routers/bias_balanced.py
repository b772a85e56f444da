"""Top-k by probability plus a bias that evens out the load without a loss.

    S = the k largest of p + b,   w = p_S
    b_e += rate * sign(mean of c - c_e)                 after each optimizer step; c_e tokens that asked for e

DeepSeek's balancing without auxiliary loss (Wang et al., arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437). The bias
selects and never weighs, so it puts no gradient of its own into training.
"""

from __future__ import annotations

import torch

from ..part import Option
from ..types import StepStatistics
from .top_k import TopK


class BiasBalanced(TopK):
    """The k largest probabilities, each shifted by its expert's bias.

    Args:
        top_k: See `TopK`.
        norm_topk_prob: See `TopK`.
        expert_dropout: See `TopK`.
        bias_rate: What a bias changes by in a step, in units of probability.
        binary: Whether a chosen expert has the weight one, before any rescaling, whatever its probability (FlyLoRA,
            arXiv 2510.08396); the task then trains no scores.
    """

    counts = True
    options = (
        Option(
            "bias_rate",
            1e-3,
            "a positive number up to 1",
            lambda value: not isinstance(value, bool) and 0 < value <= 1,
            "What the balancing bias changes by after an optimizer step, in units of probability.",
        ),
        Option(
            "binary",
            False,
            "True or False",
            lambda value: isinstance(value, bool),
            "Whether a chosen expert has the weight one, whatever its probability.",
        ),
    )

    def __init__(
        self,
        *,
        top_k: int,
        norm_topk_prob: bool = False,
        expert_dropout: float = 0.0,
        bias_rate: float = 1e-3,
        binary: bool = False,
    ) -> None:
        super().__init__(top_k=top_k, norm_topk_prob=norm_topk_prob, expert_dropout=expert_dropout)
        self.bias_rate, self.binary = bias_rate, binary

    def tensors(self, num_experts: int) -> dict[str, torch.Tensor]:
        """(E,) bias of each expert, zero at the start; see `Selector.tensors`."""
        return {"bias": torch.zeros(num_experts)}

    def pick(self, probs_TE: torch.Tensor, **own: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the k largest shifted probabilities; see `TopK.pick`. A dropped gate comes after all others."""
        shifted_TE = probs_TE.detach() + own["bias"].to(probs_TE)
        if self.expert_dropout > 0:
            shifted_TE = shifted_TE.masked_fill(probs_TE == 0, -torch.inf)
        experts_TK = shifted_TE.topk(self.top_k, dim=-1).indices
        weights_TK = probs_TE.gather(-1, experts_TK)
        return (weights_TK != 0).to(weights_TK) if self.binary else weights_TK, experts_TK

    def after_step(self, statistics: StepStatistics, **own: torch.Tensor) -> None:
        """Raise the bias of experts with less than the mean load, and lower that of the others."""
        requests_E, bias_E = statistics.requests, own["bias"]
        bias_E.add_(self.bias_rate * torch.sign(requests_E.mean() - requests_E).to(bias_E))
