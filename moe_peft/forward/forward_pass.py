"""One call of a model's stack: its mask, documents and sample groups, told to the layers as a `TokenContext`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ..place import Rows
from ..types import Routing, TokenContext
from .batch import batch_shape, first_mask, further_inputs, mask_of, segments_of, two_dimensional
from .description import describe, describe_media, of_one_modality
from .frames import frame_mask_of
from .group_columns import SampleGroups
from .joined_losses import ForwardLosses
from .layout import turned, turned_shape
from .measurement import Measurement
from .slices import Slice, is_columns, is_tile, position_in_storage
from .thread_state import Call

# What a pass knows of the tokens that its stack returns.
DESCRIPTION = (
    "shape",
    "attention_mask",
    "encoder_attention_mask",
    "segments",
    "modalities",
    "groups",
    "frames",
    "media_frames",
    "media_mask",
    "token_ids",
    "prompt",
    "cached",
)


# What decoders call the mask of the encoder states that they attend to.
ENCODER_MASKS = ("encoder_attention_mask", "encoder_padding_mask")
# What models of text and sound call the mask of the sound.
MEDIA_MASKS = ("feature_attention_mask", "input_features_mask")
# What the names of their images begin with.
IMAGES = "pixel_values"


@dataclass
class ForwardPass:
    """One call of a backbone stack.

    Attributes:
        training: Whether the stack was in train mode with gradients enabled.
        shape: (B, L) of the stack's input, or None when unknown.
        attention_mask: (B, L) mask of the stack's own tokens, or longer when earlier tokens are cached.
        encoder_attention_mask: (B, L') mask of the encoder states a decoder attends to.
        segments: (B, L) document index of each token of packed rows.
        modalities: (B, L) zero at text, where blocks are given the tokens of one modality alone.
        groups: (B,) or (S,) group per sequence, or (B, L) group per token.
        frames: Makes the (B, F) mask of hidden states of another length F, as of frames of sound.
        media_frames: The same of sound that stands beside text, of a mask of its own.
        media_mask: That mask, where the call brings no images beside the sound.
        position: The slice of the rows that ran last, where the input told which it is.
        progress: Name of a place -> positions of the rows, or tokens, that it was given in slices which do not tell.
        first_rows: Name of a place that reads tokens and relative positions -> shape of its first input, of tokens.
        unknown: Name of a place that has read tokens of which nothing tells whether they are padding; "" for none.
        token_ids: (B, L) ids of the tokens, where a part needs them.
        prompt: (B, L) bool, True before the first label of a row, where a part needs it.
        cached: Tokens in the key-value cache before these, where a part needs it.
        contexts: Token contexts made so far, with what they are of; no dictionary, whose keys would fix the sizes of a
            compiled graph.
        again: (place, adapter) -> what compiled code decided when it was run again.
        layers: (place, adapter) -> what this call's layers decided for their router losses, one per call of the layer.
        led: (block, adapter) -> decision that several places of a block share.
        inside: Passes of the stacks that ran inside this call of a whole model.
        module: The stack, or the whole model for the places outside of its stacks.
        first_node: Number of the first autograd node that is made in this call.
        last_node: Number of the first one that is made after it.
    """

    training: bool
    losses: ForwardLosses
    shape: tuple[int, int] | None = None
    attention_mask: torch.Tensor | None = None
    encoder_attention_mask: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    modalities: torch.Tensor | None = None
    groups: SampleGroups | None = None
    frames: Callable[[int], torch.Tensor | None] | None = None
    media_frames: Callable[[int], torch.Tensor | None] | None = None
    media_mask: torch.Tensor | None = None
    position: Slice | None = None
    progress: dict[str, int] = field(default_factory=dict)
    first_rows: dict[str, tuple[int, ...]] = field(default_factory=dict)
    unknown: str = ""
    token_ids: torch.Tensor | None = None
    prompt: torch.Tensor | None = None
    cached: int = 0
    contexts: list[tuple[tuple, TokenContext]] = field(default_factory=list)
    layers: dict[tuple[str, str], list[Measurement]] = field(default_factory=dict)
    again: dict[tuple[str, str], Measurement] = field(default_factory=dict)
    led: dict[tuple[str, str], Routing] = field(default_factory=dict)
    inside: list[ForwardPass] = field(default_factory=list)
    module: nn.Module | None = None
    first_node: int = 0
    last_node: int = sys.maxsize

    @classmethod
    def of(cls, call: Call, needs: frozenset[str] = frozenset()) -> ForwardPass:
        """Describe a call by its arguments, or by the stack that ran last inside it.

        Args:
            call: The call.
            needs: What parts ask of a batch beside masks and documents.
        """
        inputs = call.inputs
        if call.behind is not None:
            made = cls(call.training, call.losses, module=call.module, first_node=call.first_node)
            made.follow(call.behind)
            return made
        shape = batch_shape(inputs)
        sound = first_mask(inputs, MEDIA_MASKS)
        has_images = any(name.startswith(IMAGES) and value is not None for name, value in inputs.items())
        mask = mask_of(inputs, call.whole_inputs or inputs, shape, getattr(call.module, "config", None))
        return cls(
            training=call.training,
            losses=call.losses,
            shape=shape,
            attention_mask=mask,
            encoder_attention_mask=first_mask(inputs, ENCODER_MASKS),
            segments=segments_of(inputs),
            # ERNIE 4.5 VL has a block for each modality.
            modalities=two_dimensional(inputs.get("moe_mm_token_type_ids")),
            groups=call.groups,
            module=call.module,
            first_node=call.first_node,
            frames=frame_mask_of(call.module, mask),
            media_frames=frame_mask_of(call.module, sound),
            media_mask=None if has_images else sound,
            **(further_inputs(inputs, call.whole_inputs or inputs, shape, needs) if needs else {}),
        )

    def follow(self, stack: ForwardPass) -> None:
        """Describe the tokens that a stack returns, as what comes after it reads them: heads."""
        for name in DESCRIPTION:
            setattr(self, name, getattr(stack, name))
        self.contexts = stack.contexts

    def slice_of(self, x: torch.Tensor, place: str | None) -> Slice | None:
        """Tell which of the rows' tokens an input has, where it has some of them alone; None where it has all.

        Args:
            x: (B, c, D) for c positions of every row, (n, D) or (1, n, D) for n tokens of all rows in order.
            place: Name of the layer; None where it runs again.

        Returns:
            Of a view of the hidden states, where it lies in them; of another tensor, the slice before, whose output it
            is, or what follows the slices that the layer has had.
        """
        leading, shape = tuple(x.shape[:-1]), self.shape
        if shape is None or not (is_columns(leading, shape) or is_tile(leading, shape)):
            return None
        flat = not is_columns(leading, shape)
        start = position_in_storage(x, shape, flat=flat)
        if start is not None:
            self.position = Slice(leading, start, flat)
            return self.position
        if self.position is not None and self.position.leading == leading:
            return self.position
        if not flat and self.frames is not None and self.frames(leading[1]) is not None:
            return None
        pooled = leading == shape[:1] and not self.progress.get(place or "")
        if flat and (pooled or of_one_modality(self, leading) is not None):
            return None
        if place is None or self.attention_mask is None or torch.compiler.is_compiling():
            return None if flat else Slice(leading, None)
        return self._next_slice(leading, flat, place)

    def _next_slice(self, leading: tuple[int, ...], flat: bool, place: str) -> Slice | None:
        """The slice that follows those which a layer has had."""
        assert self.shape is not None and self.attention_mask is not None
        whole = self.shape[0] * self.shape[1] if flat else self.shape[1]
        start = self.progress.get(place, 0)
        self.progress[place] = (start + leading[-1]) % whole
        if start + leading[-1] > whole or not self.training:
            return None if flat else Slice(leading, None)
        return Slice(leading, start, flat, assumed=not bool(self.attention_mask.all()))

    def slice_tokens(self, part: Slice, device: torch.device) -> TokenContext:
        """Describe some tokens of the rows.

        Args:
            part: Which they are.
            device: Device of the input.
        """
        shape = self.shape
        assert shape is not None
        size = torch.Size(part.leading).numel()
        if part.start is None:
            return replace(self.tokens(part.leading, device), part=size)
        key = ("slice", part, device)
        known = self._known(key)
        if known is None:
            whole = self.tokens(shape, device)
            known = replace(
                whole,
                valid=part.cut(whole.valid, shape),
                sequences=part.cut(whole.sequences, shape),
                token_ids=part.cut(whole.token_ids, shape),
                prompt=part.cut(whole.prompt, shape),
                num_rows=1 if part.flat else whole.num_rows,
                part=size,
                assumed=part.assumed,
            )
            self.contexts.append((key, known))
        return known

    def tokens(
        self, leading: tuple[int, ...], device: torch.device, rows: Rows = "tokens", turned_rows: bool | None = None
    ) -> TokenContext:
        """Describe the tokens of an input with the given leading shape.

        Args:
            leading: Shape of the input without its last dimension: (B, L), (T,) for flattened rows, or any other.
            device: Device of the input.
            rows: What the rows of the input are. Those of images and sound are all valid and belong to no sample.
            turned_rows: Whether the input has positions first; None asks `positions_first`.

        Returns:
            The context of the T = prod(leading) tokens, cached for the pass.
        """
        key = (leading, device, rows, turned_rows)
        known = self._known(key)
        if known is None:
            turned_here = self.positions_first(leading, rows) if turned_rows is None else turned_rows
            if rows == "media":
                known = describe_media(self, leading, device)
            elif turned_here:
                shape = (leading[1], leading[0])
                known = turned(describe(self, shape, device, from_encoder=rows == "encoder_states"), shape)
            else:
                known = describe(self, leading, device, from_encoder=rows == "encoder_states")
            self.contexts.append((key, known))
        return known

    def positions_first(self, leading: tuple[int, ...], rows: Rows, turns: bool = False) -> bool:
        """Whether an input has positions first and rows of the batch second.

        Args:
            leading: Shape of the input without its last dimension.
            rows: What the rows of the input are.
            turns: Whether the module around the layer turns around what it is given.
        """
        if rows == "media" or self.shape is None or len(leading) != 2:
            return False
        batch, shape = self.shape[0], self.shape
        if turns and leading[1] == batch:
            return True
        if rows == "encoder_states":
            mask = self.encoder_attention_mask
            shape = (batch, leading[0]) if mask is None else (mask.shape[0], mask.shape[1])
        return turned_shape(leading, shape, self.module) or self._turned_frames(leading, shape)

    def later_rows(self, leading: tuple[int, ...], place: str) -> bool:
        """Whether a place that reads tokens first, then relative positions, is given these.

        Args:
            leading: Shape of its input without the last dimension.
            place: Its name.
        """
        return self.first_rows.setdefault(place, leading) != leading

    def positions(self) -> TokenContext:
        """Describe embeddings of relative positions, which are no tokens of any sample."""
        scale = self.losses.scale if self.training else None
        return TokenContext(training=self.training, loss_scale=scale, of_tokens=False)

    def _known(self, key: tuple) -> TokenContext | None:
        for own, context in self.contexts:
            if own == key:
                return context
        return None

    def _turned_frames(self, leading: tuple[int, ...], shape: tuple[int, int]) -> bool:
        """Whether an input of another length than the rows has positions first."""
        if len(leading) != 2 or leading[0] in shape or leading[1] != shape[0] or self.frames is None:
            return False
        return self.frames(leading[0]) is not None
