"""One call of a model's stack: its mask, documents and sample groups, told to the layers as a `TokenContext`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .batch import groups_per_sequence, number_segments
from .layer_losses import ForwardLosses, LayerLosses
from .types import TokenContext


@dataclass
class ForwardPass:
    """One call of a backbone stack.

    Attributes:
        training: Whether the stack was in train mode with gradients enabled.
        shape: (B, L) of the stack's input, or None when unknown.
        attention_mask: (B, L) mask of the stack's own tokens, or longer when earlier tokens are cached.
        encoder_attention_mask: (B, L') mask of the encoder states a decoder attends to.
        segments: (B, L) document index of each token of packed rows.
        groups: (B,) or (S,) group per sequence, or (B, L) group per token.
        contexts: Token contexts made so far.
        layers: (place, adapter) -> router losses of this call's layers, one per call of the layer.
    """

    training: bool
    losses: ForwardLosses
    shape: tuple[int, int] | None = None
    attention_mask: torch.Tensor | None = None
    encoder_attention_mask: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    groups: torch.Tensor | None = None
    contexts: dict[tuple, TokenContext] = field(default_factory=dict)
    layers: dict[tuple[str, str], list[LayerLosses]] = field(default_factory=dict)

    def tokens(self, leading: tuple[int, ...], device: torch.device, from_encoder: bool = False) -> TokenContext:
        """Describe the tokens of an input with the given leading shape.

        Args:
            leading: Shape of the input without its last dimension: (B, L), (T,) for flattened rows, or any other.
            device: Device of the input.
            from_encoder: Whether the input holds encoder states (keys and values of cross-attention).

        Returns:
            The context of the T = prod(leading) tokens, cached for the pass.
        """
        key = (leading, device, from_encoder)
        if key not in self.contexts:
            self.contexts[key] = self._describe(leading, device, from_encoder)
        return self.contexts[key]

    def _describe(self, leading: tuple[int, ...], device: torch.device, from_encoder: bool) -> TokenContext:
        mask = self.encoder_attention_mask if from_encoder else self.attention_mask
        rows = leading
        if len(leading) == 1 and self.shape is not None and leading[0] == self.shape[0] * self.shape[1]:
            rows = self.shape
        valid_T = None
        # A longer mask is that of cached tokens; but other rows, as a vision tower's patches, have no mask at all.
        cached = mask is not None and rows == self.shape and mask.shape[0] == rows[0] and mask.shape[1] > rows[1]
        if mask is not None and len(rows) == 2 and (cached or tuple(mask.shape) == tuple(rows)):
            valid_T = mask[:, mask.shape[1] - rows[1] :].reshape(-1).to(device).bool()
        if self.segments is not None and not from_encoder and tuple(self.segments.shape) == rows:
            sequences_T, num_sequences = number_segments(self.segments.to(device))
        elif len(rows) >= 2:
            sequences_T = torch.arange(rows[0], device=device).repeat_interleave(torch.Size(rows[1:]).numel())
            num_sequences = rows[0]
        elif self.shape is not None and rows == self.shape[:1]:
            # One vector per row, as a pooled token.
            sequences_T, num_sequences = torch.arange(rows[0], device=device), rows[0]
        else:
            sequences_T, num_sequences = None, 1
        groups = None if self.groups is None else self.groups.to(device)
        return TokenContext(
            training=self.training,
            valid=valid_T,
            sequences=sequences_T,
            num_sequences=num_sequences,
            groups=groups_per_sequence(groups, sequences_T, num_sequences, rows),
            loss_scale=self.losses.scale if self.training else None,
        )
