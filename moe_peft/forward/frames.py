"""The padding of stacks whose hidden states have another length than their mask: frames, windows, pooled positions.

Encoders of sound make frames of samples, sparse attention pads rows to whole windows, and some stacks pool positions
on the way. What their mask becomes there is what the stack itself makes of it, found by the method that does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from inspect import signature
from typing import Any, cast

import torch
from torch import nn

# Methods that turn a number of samples into one of frames.
FRAME_LENGTHS = ("_get_feat_extract_output_lengths", "_get_subsampling_output_length")
# Method of layers that shorten the frames once more.
STRIDES = "_compute_sub_sample_lengths_from_attention_mask"
# Methods that pad the end of the rows, to whole windows or blocks.
PADDERS = ("_pad_to_window_size", "_pad_to_block_size", "_pad_to_mult_of_chunk_length")


def frame_mask_of(stack: nn.Module, mask: torch.Tensor | None) -> Callable[[int], torch.Tensor | None] | None:
    """How a stack makes the mask of hidden states of another length; None without a mask.

    Args:
        stack: The stack.
        mask: (B, L) attention mask.

    Returns:
        Function of the length F of hidden states; gives (B, F) bool, or None where the stack makes no such length.
    """
    if mask is None:
        return None
    known: dict[int, torch.Tensor | None] = {}

    def of_frames(num_frames: int) -> torch.Tensor | None:
        if num_frames not in known:
            known[num_frames] = _made(stack, mask, num_frames)
        return known[num_frames]

    return of_frames


def _made(stack: nn.Module, mask: torch.Tensor, num_frames: int) -> torch.Tensor | None:
    blocks = _blocks(stack, mask)
    if blocks is not None:
        return blocks.get(num_frames)
    if num_frames == mask.shape[1]:
        return mask.bool()
    if num_frames > mask.shape[1] and _owner(stack, PADDERS) is not None:
        return nn.functional.pad(mask, (0, num_frames - mask.shape[1])).bool()
    for kind in (_sampled, _strided, _pooled, _downsampled, _latent, _streams):
        found = next((made for made in kind(stack, mask) if made.shape[1] == num_frames), None)
        if found is not None:
            return found.bool()
    return None


def _owner(stack: nn.Module, names: tuple[str, ...]) -> tuple[nn.Module, str] | None:
    """The first module of a stack that has one of some attributes, and its name."""
    return next(((module, name) for module in stack.modules() for name in names if hasattr(module, name)), None)


def _sampled(stack: nn.Module, mask: torch.Tensor) -> Iterator[torch.Tensor]:
    found = _owner(stack, FRAME_LENGTHS)
    if found is None:
        return
    to_frames: Any = getattr(*found)
    known = signature(to_frames).parameters
    variants = [{"add_adapter": False}, {"add_adapter": True}] if "add_adapter" in known else [{}]
    samples_B = torch.cat([mask.long().sum(-1), mask.new_full((1,), mask.shape[1], dtype=torch.long)])
    for variant in variants:
        for frames_B in _numbers_of_frames(to_frames, samples_B, variant):
            *of_rows, num_frames = frames_B.tolist()
            frames_BF = (
                torch.arange(num_frames, device=mask.device) < mask.new_tensor(of_rows, dtype=torch.long)[:, None]
            )
            yield frames_BF
            squeeze = getattr(getattr(stack, "config", None), "squeeze_factor", 1)
            if squeeze > 1:
                yield nn.functional.max_pool1d(frames_BF.float(), squeeze, squeeze)


def _numbers_of_frames(
    to_frames: Callable[..., Any], samples_B: torch.Tensor, variant: dict[str, bool]
) -> Iterator[torch.Tensor]:
    """What a stack's own method says of numbers of samples: one number of frames for each, or some in a row of layers.

    Some take a tensor, some a single number, and some are of a part that no mask concerns, which fails either way.
    """
    made: Any
    try:
        made = to_frames(samples_B, **variant)
    except (TypeError, ValueError, RuntimeError):
        try:
            made = torch.tensor([int(to_frames(n, **variant)) for n in samples_B.tolist()])
        except (TypeError, ValueError, RuntimeError):
            return
    for numbers in made if isinstance(made, tuple) else (made,):
        if isinstance(numbers, torch.Tensor) and numbers.shape == samples_B.shape:
            yield numbers.long()


def _strided(stack: nn.Module, mask: torch.Tensor) -> Iterator[torch.Tensor]:
    """Adapters of speech encoders shorten the frames with strided convolutions, one layer after the other."""
    frames_B, num_frames = mask.long().sum(-1), mask.shape[1]
    for module in stack.modules():
        if not hasattr(module, STRIDES) or not (hasattr(module, "kernel_size") and hasattr(module, "stride")):
            continue
        kernel, stride = cast(int, module.kernel_size), cast(int, module.stride)
        lost = kernel - 2 * (kernel // 2)
        frames_B, num_frames = (frames_B - lost) // stride + 1, (num_frames - lost) // stride + 1
        yield torch.arange(num_frames, device=mask.device) < frames_B[:, None]


def _pooled(stack: nn.Module, mask: torch.Tensor) -> Iterator[torch.Tensor]:
    """Funnel pools its mask with the minimum, again and again."""
    found = _owner(stack, ("attention_structure",))
    pool: Any = getattr(getattr(*found), "pool_tensor", None) if found is not None else None
    pooled = mask.float()
    while pool is not None and pooled.shape[1] > 2:
        pooled = pool(pooled, mode="min")
        yield pooled


def _downsampled(stack: nn.Module, mask: torch.Tensor) -> Iterator[torch.Tensor]:
    """CANINE makes molecules of characters."""
    found = _owner(stack, ("_downsample_attention_mask",))
    if found is not None:
        module: Any = found[0]
        yield module._downsample_attention_mask(mask, downsampling_rate=module.config.downsampling_rate)


def _latent(stack: nn.Module, mask: torch.Tensor) -> Iterator[torch.Tensor]:
    """Perceiver's latents are no positions of the rows; all of them count."""
    num_latents = getattr(getattr(stack, "config", None), "num_latents", None)
    if isinstance(num_latents, int):
        yield mask.new_ones(mask.shape[0], num_latents)


def _blocks(stack: nn.Module, mask: torch.Tensor) -> dict[int, torch.Tensor] | None:
    """Pegasus-X pads rows to whole blocks on the way, and has global tokens, all of which count.

    Returns:
        Masks by length, none where both have the same; None for another stack.
    """
    config = getattr(stack, "config", None)
    block_size, num_global = (getattr(config, name, None) for name in ("block_size", "num_global_tokens"))
    if not hasattr(stack, "embed_global") or not isinstance(block_size, int) or not isinstance(num_global, int):
        return None
    padded = nn.functional.pad(mask, (0, -mask.shape[1] % block_size)).bool()
    if padded.shape[1] == num_global:
        return {}
    return {padded.shape[1]: padded, num_global: torch.ones_like(padded[:, :1]).expand(-1, num_global)}


def _streams(stack: nn.Module, mask: torch.Tensor) -> Iterator[torch.Tensor]:
    """ProphetNet's decoder joins its main stream and one for each future token it predicts, in a row's order."""
    num_streams = getattr(getattr(stack, "config", None), "ngram", None)
    if isinstance(num_streams, int) and num_streams > 0:
        yield mask.repeat(1, num_streams)
        yield mask.repeat(1, 1 + num_streams)
