"""One decision for a whole sample, made of its prompt: z = W LN(mean of x over the prompt).

SMEAR (Muqeeth et al., arXiv 2306.03745), with all experts; MEO (He et al., arXiv 2310.09832), with the k largest. The
prompt is what comes before the first label of a sample, so that no answer leaks into the decision, or its first token,
which nothing predicts; where a batch brings no labels it is all that a call holds, as in generation, whose first call
holds the prompt. Later calls with a key-value cache go on with the decision of that first call.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch.nn import functional as F

from ..ops import project
from ..types import TokenContext
from .linear import LinearRouter
from .whole_rows import check_whole_rows


class PromptMean(LinearRouter):
    """Scores by the mean of the prompt; arguments as in `LinearRouter`.

    Attributes:
        weight: (num_scores, D).
    """

    context_needs = frozenset({"prompt", "cached"})
    decode_stateless = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kept: dict[int, torch.Tensor] = {}

    def scores(self, x: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Score the experts for each token by its sample's prompt; arguments as in `Router.scores`.

        Raises:
            ValueError: The tokens are slices of their rows, or go on with samples whose prompt has not been seen.
        """
        scores_SE, owner_T = self.of_prompts(x, context, self.weight)
        return scores_SE[owner_T]

    def of_prompts(
        self, x: torch.Tensor, context: TokenContext, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score the experts for each sample.

        Args:
            x: (T, D) input.
            context: What is known about the tokens.
            weight: (num_scores, D).

        Returns:
            (S, num_scores) scores, and the (T,) sample of each token.
        """
        why = "a prompt's mean is that of whole rows"
        check_whole_rows(context, type(self).__name__, why, "use another scorer")
        owner_T = context.sequences
        if owner_T is None:
            owner_T = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
        if context.cached:
            return self._of_first_call(context), owner_T
        scores_SE = project(self.mean(x, owner_T, context), weight)
        if not context.training:
            self._kept[threading.get_ident()] = scores_SE.detach()
        return scores_SE, owner_T

    def mean(self, x: torch.Tensor, owner_T: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """(S, D) normalised mean of each sample's prompt, float32 or wider; zero where there is none."""
        x_TD = x.to(torch.promote_types(x.dtype, torch.float32))
        counted_T = torch.ones_like(owner_T, dtype=torch.bool) if context.prompt is None else context.prompt
        if context.valid is not None:
            counted_T = counted_T & context.valid
        x_TD = x_TD.masked_fill(~counted_T[:, None], 0.0)
        sums_SD = x_TD.new_zeros(context.num_sequences, x_TD.shape[1]).index_add(0, owner_T, x_TD)
        counts_S = x_TD.new_zeros(context.num_sequences).index_add(0, owner_T, counted_T.to(x_TD.dtype))
        return F.layer_norm(sums_SD / counts_S.clamp_min(1)[:, None], sums_SD.shape[1:])

    def _of_first_call(self, context: TokenContext) -> torch.Tensor:
        kept_SE = self._kept.get(threading.get_ident())
        if kept_SE is None or kept_SE.shape[0] != context.num_sequences:
            seen = "none" if kept_SE is None else f"those of {kept_SE.shape[0]}"
            raise ValueError(
                f"{type(self).__name__} goes on with {context.num_sequences} samples by their key-value cache, but "
                f"has seen {seen} from their start. Give the model the whole prompts in the first call, and the same "
                "rows in the later ones, as generate does; or call it with use_cache=False."
            )
        return kept_SE

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the samples that are under way, which are no part of a copy."""
        return {**self.__dict__, "_kept": {}}
