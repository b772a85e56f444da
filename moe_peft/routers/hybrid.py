"""A mixture of token-wise and sample-wise routing: p = (1 - a) softmax(W x) + a softmax(V LN(mean of the prompt)).

HMoRA (Liao et al., ICLR 2025), whose deeper layers look more at the task: a = sigmoid(alpha) is learned at every
place, and starts at alpha = eps (2 l / L - 1) + mu in layer l of L. The task is read off the prompt, as in
`prompt_mean`. The scores are the logarithm of p, so that the softmax gives p.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from ..ops import project
from ..part import Option
from ..types import TokenContext
from .linear import LinearArgs
from .prompt_mean import PromptMean

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -100 <= value <= 100


class Hybrid(PromptMean):
    """Scores by the token and by its sample's prompt.

    Args:
        in_features: D, width of the input.
        num_experts: E.
        mu: alpha in the middle of the stack at the start.
        eps: How much more it is at the end of the stack.
        init_std: See `LinearRouter`.
        **shared: See `LinearRouter`. Noise is on what the token's own scores read.

    Attributes:
        weight: W (num_scores, D).
        prompt_weight: V (num_scores, D).
        alpha: (1,) logit of the share of the sample.
    """

    gives = frozenset()  # further columns of selectors are no probabilities that could be mixed
    log_scores = True
    options = (
        Option("mu", 0.0, "a number from -100 to 100", _is_number, "Logit of the sample's share in the middle layer."),
        Option("eps", 2.0, "a number from -100 to 100", _is_number, "How much more that logit is in the last layer."),
    )

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        mu: float = 0.0,
        eps: float = 2.0,
        init_std: float | None = None,
        **shared: Unpack[LinearArgs],
    ) -> None:
        super().__init__(in_features, num_experts, init_std=init_std, **shared)
        self.mu, self.eps = mu, eps
        self.prompt_weight = nn.Parameter(torch.empty_like(self.weight))
        bound = in_features**-0.5
        if init_std is None:
            nn.init.uniform_(self.prompt_weight, -bound, bound)
        else:
            nn.init.normal_(self.prompt_weight, std=init_std)
        self.alpha = nn.Parameter(torch.full((1,), float(mu)))

    def stands_in(self, layer_index: int, num_layers: int) -> None:
        """Start with the share of a layer; see `Router.stands_in`."""
        nn.init.constant_(self.alpha, self.eps * (2 * (layer_index + 1) / num_layers - 1) + self.mu)

    def scores(self, x: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Score the experts for each token and its sample; arguments as in `Router.scores`."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        of_prompts_SE, owner_T = self.of_prompts(x, context, self.prompt_weight)
        token_TE = project(self.jittered(x.to(dtype), context), self.weight, dtype=dtype).log_softmax(-1)
        alpha = self.alpha.to(dtype)
        sample_TE = of_prompts_SE.to(dtype).log_softmax(-1)[owner_T]
        return torch.logaddexp(token_TE + F.logsigmoid(-alpha), sample_TE + F.logsigmoid(alpha))
