"""Decode against a weaker routing of the same model (SCMoE, arXiv 2405.14507).

z = (1 + beta) log p_strong - beta log p_weak    over tokens with p_strong >= alpha max p_strong, -inf elsewhere
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers import LogitsProcessor

from ..messages import shown
from .checks import check_module


class SelfContrast(LogitsProcessor):
    """A processor for `model.generate(..., logits_processor=LogitsProcessorList([SelfContrast(model)]))`.

    The weak pass reads the whole text again for each new token, so that decoding costs more than twice as much.

    Args:
        model: A model with a language model's head.
        weak: Makes the block in which the model is weak, such as `lambda: expert_mask(model, off=[0])`; None takes the
            model without its adapters.
        alpha: Share of the largest probability that a token needs; the paper's 0.1.
        beta: Strength; 0 leaves the strong distribution, cut by alpha. The paper's 0.5.
        attention_mask: (B, L) mask of the prompts, where they are padded.

    Raises:
        TypeError: The model is none, or `weak` makes nothing.
        ValueError: A number or mask cannot work, or the model has no adapters to do without.
    """

    def __init__(
        self,
        model: nn.Module,
        weak: Callable[[], AbstractContextManager[Any]] | None = None,
        *,
        alpha: float = 0.1,
        beta: float = 0.5,
        attention_mask: torch.Tensor | None = None,
    ) -> None:
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha <= 1:
            raise ValueError(f"SelfContrast: alpha={shown(alpha)} must be a number above 0 and up to 1, such as 0.1.")
        if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 <= beta < float("inf"):
            raise ValueError(f"SelfContrast: beta={shown(beta)} must be a number from 0, such as 0.5.")
        check_module(model, "SelfContrast")
        if weak is not None and not callable(weak):
            raise TypeError(
                f"SelfContrast: weak={shown(weak)} must be a function that makes a block, as "
                "lambda: expert_mask(model, off=[0])."
            )
        if attention_mask is not None and (not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2):
            raise ValueError(f"SelfContrast: attention_mask={shown(attention_mask)} must be the prompts' (B, L) mask.")
        without = getattr(model, "disable_adapter", None)
        if weak is None and without is None:
            raise ValueError(
                f"SelfContrast: {type(model).__name__} is no PeftModel, so it has no adapters to do without. Give "
                "`weak`, as lambda: expert_mask(model, off=[0], backbone=True)."
            )
        self.model: Any = model
        self.weak: Any = weak or without
        self.alpha, self.beta = float(alpha), float(beta)
        self.attention_mask = attention_mask

    @torch.no_grad()
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Contrast the scores of the next token.

        Args:
            input_ids: (B, L) text so far.
            scores: (B, V) of the strong pass.

        Raises:
            ValueError: A pass gives NaN, of which no token can be chosen, or the mask is of other prompts.
        """
        strong = scores.float().log_softmax(-1)
        with self.weak():
            out = self.model(input_ids=input_ids, attention_mask=self._mask(input_ids), use_cache=False)
        weak = out.logits[:, -1].float().log_softmax(-1).to(strong.device)
        for said, name in ((strong, "strong"), (weak, "weak")):
            if bool(said.isnan().any()):
                raise ValueError(
                    f"SelfContrast: the {name} pass gives NaN: weights of the model or its adapter are broken, or "
                    "overflow in their dtype. Load them from an earlier checkpoint, or in float32."
                )
        contrasted = contrast(strong, weak, self.alpha, self.beta)
        return contrasted.to(scores.dtype)  # type: ignore[return-value]

    def _mask(self, input_ids: torch.Tensor) -> torch.Tensor:
        mask = torch.ones_like(input_ids)
        if self.attention_mask is not None:
            if len(input_ids) % len(self.attention_mask) or self.attention_mask.shape[1] > input_ids.shape[1]:
                raise ValueError(
                    f"SelfContrast: attention_mask of shape {tuple(self.attention_mask.shape)} is of other prompts "
                    f"than the text of shape {tuple(input_ids.shape)}. Give the mask that generate is given."
                )
            # Beams and several answers repeat the rows.
            own = self.attention_mask.repeat_interleave(len(input_ids) // len(self.attention_mask), dim=0)
            mask[:, : own.shape[1]] = own.to(mask)
        return mask


def contrast(strong: torch.Tensor, weak: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    """The rule itself.

    Args:
        strong: (B, V) log-probabilities.
        weak: (B, V) log-probabilities.
        alpha: Share of the largest probability that a token needs.
        beta: Strength.

    Returns:
        (B, V) scores; a token that the strong pass rules out stays so.
    """
    allowed = strong >= strong.amax(-1, keepdim=True) + torch.tensor(alpha, dtype=strong.dtype).log().to(strong.device)
    mixed = (1 + beta) * strong - beta * weak.clamp_min(torch.finfo(weak.dtype).min / 4)
    return mixed.masked_fill(~allowed, float("-inf"))
