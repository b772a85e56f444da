"""Where an adapter acts: `Place`, a module that it wraps, and `MoeLayer`, a sparse layer of the backbone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

# What the rows of a layer's input are: tokens of the text, encoder states that cross-attention reads, patches of
# images and frames of sound, or embeddings of relative positions, which belong to no sample; some layers read tokens
# in one call of a pass and positions in another.
Rows = Literal["tokens", "encoder_states", "media", "positions", "tokens_and_positions"]


@dataclass(frozen=True)
class Place:
    """A module of the backbone that an adapter wraps.

    Attributes:
        name: Full module name.
        in_features: D.
        out_features: O.
        kind: Class name of the module.
        num_experts: Experts of the backbone there; None where it has none.
        layer_index: Index of the layer it belongs to, in its stack; None for a place outside of numbered layers.
        num_layers: Number of layers of that stack.
        base: The module itself, for adapters that start from its weights.
        rows: What the rows of its input are.
        block: Name of the decision that it shares with other places; None where it decides alone.
        weight: Gives the (O, D) weight of a linear layer, dequantized; None for other modules.
        inner_features: F, width between the matrices of an FFN; None for other modules.
        leader: Full name of the place that makes that decision; None where this one does.
    """

    name: str
    in_features: int
    out_features: int
    kind: str = "Linear"
    num_experts: int | None = None
    layer_index: int | None = None
    num_layers: int | None = None
    base: nn.Module | None = field(default=None, repr=False, compare=False)
    rows: Rows = "tokens"
    block: str | None = None
    leader: str | None = None
    inner_features: int | None = None
    weight: Callable[[], torch.Tensor] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def typical(cls, in_features: int = 8, out_features: int = 8, **fields: Any) -> Place:
        """A place that stands for those of any kind, to see what an adapter's parts are like there.

        Args:
            in_features: D.
            out_features: O.
            **fields: Further attributes.
        """
        return cls("any", in_features, out_features, inner_features=in_features, **fields)


@dataclass(frozen=True)
class MoeLayer:
    """One sparse layer of a backbone.

    Attributes:
        index: Index of the decoder layer.
        experts: Full name of the fused experts module.
        block: Full name of the block that owns them; None where the decoder layer itself does.
        router: Full name of the router beside the experts.
        shared_experts: Full names of the modules beside them that every token uses.
        num_experts: E.
        in_features: Width of the experts' input.
        out_features: Width of their output.
    """

    index: int
    experts: str
    block: str | None
    router: str | None
    shared_experts: tuple[str, ...]
    num_experts: int
    in_features: int
    out_features: int
