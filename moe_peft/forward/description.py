"""What a call of a stack tells of the tokens of an input: which are valid, of which sample, in which group."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..types import TokenContext
from .batch import number_segments
from .group_columns import groups_per_sequence

if TYPE_CHECKING:
    from .forward_pass import ForwardPass


def describe(
    own_pass: ForwardPass, leading: tuple[int, ...], device: torch.device, *, from_encoder: bool
) -> TokenContext:
    """Describe the tokens of an input of the stack, or of one around it.

    Args:
        own_pass: The call of the stack.
        leading: Shape of the input without its last dimension.
        device: Device of the input.
        from_encoder: Whether its rows are the encoder states that a decoder attends to.
    """
    rows, shape = leading, own_pass.shape
    if shape is not None and (leading == (shape[0] * shape[1],) or _same_rows(leading, shape)):
        rows = shape
    if not from_encoder and _are_relative(own_pass, rows):
        return own_pass.positions()
    kept_T = of_one_modality(own_pass, rows)
    if kept_T is not None:
        return _kept(own_pass, kept_T.to(device))
    valid_T, padding_known = _valid(own_pass, rows, device, from_encoder)
    sequences_T, num_sequences = _sequences(own_pass, rows, device, from_encoder)
    groups = groups_per_sequence(own_pass.groups, sequences_T, num_sequences, rows)
    return TokenContext(
        training=own_pass.training,
        valid=valid_T,
        sequences=sequences_T,
        num_sequences=num_sequences,
        groups=None if groups is None else groups.to(device),
        loss_scale=own_pass.losses.scale if own_pass.training else None,
        num_rows=rows[0] if len(rows) >= 2 else 1,
        token_ids=_own(own_pass, own_pass.token_ids, rows, device, from_encoder),
        prompt=_own(own_pass, own_pass.prompt, rows, device, from_encoder),
        cached=own_pass.cached,
        padding_known=padding_known,
    )


def _kept(own_pass: ForwardPass, kept_T: torch.Tensor) -> TokenContext:
    """Those of the batch's tokens that a block for one modality is given."""
    assert own_pass.shape is not None
    whole = own_pass.tokens(own_pass.shape, kept_T.device)
    assert whole.sequences is not None
    valid_T, ids_T, prompt_T = (
        None if own is None else own[kept_T] for own in (whole.valid, whole.token_ids, whole.prompt)
    )
    return replace(
        whole, valid=valid_T, sequences=whole.sequences[kept_T], token_ids=ids_T, prompt=prompt_T, num_rows=1
    )


def _valid(
    own_pass: ForwardPass, rows: tuple[int, ...], device: torch.device, from_encoder: bool
) -> tuple[torch.Tensor | None, bool]:
    """(T,) which tokens are no padding, None for all of them, and whether that is known."""
    mask = own_pass.encoder_attention_mask if from_encoder else own_pass.attention_mask
    if mask is not None and len(rows) == 3 and rows[0] == mask.shape[0]:
        return _valid_of_heads(own_pass, rows, device, from_encoder)
    if mask is None or len(rows) != 2:
        return None, True
    # A longer mask is that of cached tokens; but other rows, as a vision tower's patches, have no mask at all.
    cached = rows == own_pass.shape and mask.shape[0] == rows[0] and mask.shape[1] > rows[1]
    if cached or tuple(mask.shape) == tuple(rows):
        return mask[:, mask.shape[1] - rows[1] :].reshape(-1).to(device).bool(), True
    if rows[0] != mask.shape[0] or own_pass.frames is None:
        return None, True
    frames_BF = own_pass.frames(rows[1])
    if frames_BF is None:
        return None, not _has_padding(own_pass, rows)
    return frames_BF.reshape(-1).to(device), True


def _valid_of_heads(
    own_pass: ForwardPass, rows: tuple[int, ...], device: torch.device, from_encoder: bool
) -> tuple[torch.Tensor | None, bool]:
    """The same of rows (B, H, L) or (B, L, H), as of heads, each of which has all positions."""
    found = [_valid(own_pass, (rows[0], length), device, from_encoder) for length in rows[1:]]
    masks = [None if valid is None else valid.view(rows[0], -1) for valid, _ in found]
    if masks[0] is not None and masks[1] is not None:
        # As many heads as positions: which are which is not known where it matters.
        return None, bool(masks[0].all())
    if masks[0] is not None:
        return masks[0][:, :, None].expand(rows).reshape(-1), True
    if masks[1] is not None:
        return masks[1][:, None].expand(rows).reshape(-1), True
    return None, True


def _sequences(
    own_pass: ForwardPass, rows: tuple[int, ...], device: torch.device, from_encoder: bool
) -> tuple[torch.Tensor | None, int]:
    """(T,) sample or packed document of each token, None where all are of one, and how many there are."""
    if own_pass.segments is not None and not from_encoder and tuple(own_pass.segments.shape) == rows:
        return number_segments(own_pass.segments.to(device))
    if len(rows) >= 2:
        of_rows = torch.arange(rows[0], device=device)
        return of_rows.repeat_interleave(torch.Size(rows[1:]).numel()), rows[0]
    if own_pass.shape is not None and rows == own_pass.shape[:1]:
        # One vector per row, as a pooled token.
        return torch.arange(rows[0], device=device), rows[0]
    return None, 1


def _are_relative(own_pass: ForwardPass, rows: tuple[int, ...]) -> bool:
    """Whether rows are the relative positions of F frames, 2 F - 1, given once for all samples or once for each."""
    mask, frames_of = own_pass.attention_mask, own_pass.frames
    if mask is None or frames_of is None or len(rows) != 2 or rows[0] not in (1, mask.shape[0]):
        return False
    positions, even = (rows[1] + 1) // 2, rows[1] % 2 == 0  # a compiler's lengths have no divmod
    if own_pass.shape is not None or even or frames_of(rows[1]) is not None:
        return False
    return positions > 1 and frames_of(positions) is not None


def _has_padding(own_pass: ForwardPass, rows: tuple[int, ...]) -> bool:
    """Whether rows of another length than their mask may have padding, in a training pass."""
    mask, shape = own_pass.attention_mask, own_pass.shape
    if not own_pass.training or mask is None or torch.compiler.is_compiling():
        return False
    if shape is None:  # samples of sound, and frames of which the stack does not say how they are made
        return rows[1] != mask.shape[1] and rows[1] > 1 and not bool(mask.all())
    return rows[1] > shape[1] > 1 and tuple(mask.shape) == shape and not bool(mask.all())


def _own(
    own_pass: ForwardPass,
    values_BL: torch.Tensor | None,
    rows: tuple[int, ...],
    device: torch.device,
    from_encoder: bool,
) -> torch.Tensor | None:
    """(T,) values of the stack's own tokens, where the rows are those, or those that an encoder's pooler reads."""
    if values_BL is None or from_encoder or own_pass.shape is None:
        return None
    if rows == own_pass.shape[:1]:
        return values_BL[:, 0].to(device)
    return values_BL.reshape(-1).to(device) if rows == own_pass.shape else None


def of_one_modality(own_pass: ForwardPass, rows: tuple[int, ...]) -> torch.Tensor | None:
    """Which of the batch's B * L tokens some rows are, by their number; None where it does not tell."""
    if len(rows) != 1 or own_pass.modalities is None or tuple(own_pass.modalities.shape) != own_pass.shape:
        return None
    is_media_T = own_pass.modalities.reshape(-1).bool()
    counts = int((~is_media_T).sum()), int(is_media_T.sum())
    if counts[0] == counts[1] or rows[0] not in counts:
        return None
    return is_media_T if rows[0] == counts[1] else ~is_media_T


def describe_media(own_pass: ForwardPass, leading: tuple[int, ...], device: torch.device) -> TokenContext:
    """Describe tokens of images and sound, valid but for the padding of sound; arguments as in `describe`."""
    images = leading[0] if len(leading) >= 2 else 1
    frames_of = own_pass.media_frames
    frames_BF = frames_of(leading[1]) if frames_of is not None and len(leading) == 2 else None
    if frames_BF is not None and frames_BF.shape[0] != images:
        frames_BF = None
    per_image = torch.Size(leading[1:]).numel()
    return TokenContext(
        training=own_pass.training,
        valid=None if frames_BF is None else frames_BF.reshape(-1).to(device),
        sequences=torch.arange(images, device=device).repeat_interleave(per_image) if images > 1 else None,
        num_sequences=images,
        loss_scale=own_pass.losses.scale if own_pass.training else None,
        padding_known=frames_BF is not None or not _has_silence(own_pass, leading),
    )


def _has_silence(own_pass: ForwardPass, rows: tuple[int, ...]) -> bool:
    """Whether frames of clips may have padding that nothing tells, in a training pass; as in `_has_padding`."""
    mask = own_pass.media_mask
    if not own_pass.training or mask is None or torch.compiler.is_compiling():
        return False
    return len(rows) == 2 and rows[0] == mask.shape[0] and rows[1] > 1 and not bool(mask.all())


def _same_rows(leading: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether two shapes differ in axes of length one alone, as those of heads that share their keys and values."""
    return len(leading) > len(shape) and [n for n in leading if n != 1] == [n for n in shape if n != 1]
