"""What a router decides, what it may know, and a loss on it.

`Routing`, `TokenContext`, `RouterLoss`, `StepStatistics`.

Shape suffixes of local tensors:
    B batch rows, L positions of a row, T tokens (B * L flattened), S sequences (rows, or documents of a packed row),
    D input width, O output width, E experts, K experts a token uses, r rank of one expert, R = E * r,
    N length of a loss's sums.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch

from .part import Part


class MoePeftWarning(UserWarning):
    """Every warning this package gives."""


class LossScale:
    """Weight of the router losses of one forward pass, read when their gradient is injected in the backward pass.

    Attributes:
        value: Factor applied to the gradient of every loss of the pass; a float or a 0-d tensor.
        attached: Number of places whose losses were, or will be in a recomputation, attached to the autograd graph.
        watched: Whether it is known when a backward pass reaches what the pass returned.
        reached: Number of times that one has.
        replaced: Whether the gradient of `router_loss(model)` has set the value.
        graph: 0-d sum of the losses that compiled code has injected with the value that the pass began with; None
            where it has not.
    """

    def __init__(self, value: float = 1.0) -> None:
        self.value: float | torch.Tensor = value
        self.attached = 0
        self.watched = False
        self.reached = 0
        self.replaced = False
        self.graph: torch.Tensor | None = None


@dataclass(frozen=True)
class TokenContext:
    """What a forward pass knows about the T tokens at a place, besides their values.

    Attributes:
        training: Whether this is a gradient-enabled training pass. Noise, dropout, capacity and losses apply only
            then.
        valid: (T,) bool, False at padding; None when every token counts.
        sequences: (T,) int64, non-decreasing index of the sequence a token belongs to; None for a single sequence.
        num_sequences: S, the number of sequences.
        groups: (S,) int64, the group of each sequence; None when the batch has none.
        loss_scale: The pass's weight of injected losses; None outside a training pass.
        token_ids: (T,) int64 ids of the tokens; None where no part needs them, or the batch brings none.
        prompt: (T,) bool, True before the first label of a row; None where no part needs it, or without labels.
        cached: Tokens of each row that came before these ones, in the key-value cache; 0 where no part needs it.
        num_rows: B, the number of equal runs of tokens.
        part: Number of tokens that these are, where a backbone runs a module in slices of the rows; 0 for all.
        assumed: Whether the mask, which has padding, is theirs only if the calls of the module are slices of the rows,
            one after the other.
        padding_known: Whether padding is told from tokens; False where rows have another length than their mask.
        of_tokens: Whether these are tokens; False for embeddings of relative positions, whose number is that of the
            longest row, so that no router loss and no statistic counts them.
    """

    training: bool = False
    valid: torch.Tensor | None = None
    sequences: torch.Tensor | None = None
    num_sequences: int = 1
    groups: torch.Tensor | None = None
    loss_scale: LossScale | None = None
    token_ids: torch.Tensor | None = None
    prompt: torch.Tensor | None = None
    cached: int = 0
    num_rows: int = 1
    part: int = 0
    assumed: bool = False
    padding_known: bool = True
    of_tokens: bool = True

    def rows(self, numbers: Sequence[int]) -> TokenContext:
        """Describe the tokens of some rows of the batch, as batches that mix adapters split it.

        Args:
            numbers: The rows, ascending.

        Returns:
            Their context, with sequences numbered from zero; this one where it knows of no rows.
        """
        kept = list(numbers)
        if self.num_rows == 1 and len(kept) != 1:  # rows are not told apart
            return self

        def of_rows(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.view(self.num_rows, -1)[kept].reshape(-1)

        sequences_T, groups, num_sequences = of_rows(self.sequences), self.groups, self.num_sequences
        if sequences_T is not None:
            numbers_S, sequences_T = sequences_T.unique(return_inverse=True)
            groups, num_sequences = None if groups is None else groups[numbers_S], len(numbers_S)
        return replace(
            self,
            valid=of_rows(self.valid),
            sequences=sequences_T,
            num_sequences=num_sequences,
            groups=groups,
            token_ids=of_rows(self.token_ids),
            prompt=of_rows(self.prompt),
            num_rows=len(kept),
        )


class StepStatistics(Protocol):
    """What the routers of one place decided in the training passes since the last optimizer step, of all processes.

    Attributes:
        requests: (E,) tokens that asked for each expert, before any capacity.
        mass: (E,) summed combine weight of each expert.
        tokens: 0-d number of valid tokens.
        load: (E,) share of the requests that each expert gets, summing to one.
        importance: (E,) share of the gate mass that each expert gets, summing to one.
    """

    @property
    def requests(self) -> torch.Tensor: ...
    @property
    def mass(self) -> torch.Tensor: ...
    @property
    def tokens(self) -> torch.Tensor: ...
    @property
    def load(self) -> torch.Tensor: ...
    @property
    def importance(self) -> torch.Tensor: ...


@dataclass(frozen=True)
class Routing:
    """A router's decision for T tokens.

    Attributes:
        weights: (T, K) combine weight of each selected expert, or (T, E) of every expert when dense. Zero where a slot
            is dropped.
        experts: (T, K) int64 index of each selected expert; E marks a slot without an expert. None when dense.
        logits: (T, E) float32 scores before the gate function, and the selector's further columns.
        probs: (T, E) float32 gate probabilities, after expert dropout.
        dropped: (T, K) bool, True where an expert was chosen but had no capacity left; None without a capacity.
        context: What was known about the tokens.
        num_experts: E; left out, the number of columns of `probs`.
        extras: Further (T, ...) float32 tensors of the decision by name, with their graph, for losses that need them.
    """

    weights: torch.Tensor
    experts: torch.Tensor | None
    logits: torch.Tensor
    probs: torch.Tensor
    dropped: torch.Tensor | None = None
    context: TokenContext = field(default_factory=TokenContext)
    num_experts: int = 0
    extras: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.num_experts:
            object.__setattr__(self, "num_experts", self.probs.shape[-1])

    @property
    def valid(self) -> torch.Tensor | None:
        """(T,) bool, False at padding; None when every token counts."""
        return self.context.valid

    @property
    def token_dim(self) -> int:
        """Dimension of the tokens in its tensors; one where several places are stacked before it."""
        return 0

    @property
    def one(self) -> Routing:
        """The decision of one place: this, or the first of several that are stacked."""
        return self

    def with_weights(self, weights: torch.Tensor) -> Routing:
        """The same decision with other combine weights; at a tenth of the cost of `dataclasses.replace`.

        Args:
            weights: (T, K), or (T, E) of a dense decision.
        """
        made: Routing = object.__new__(type(self))
        made.__dict__.update(self.__dict__, weights=weights)
        return made

    def gate_matrix(self) -> torch.Tensor:
        """Combine weights as one column per expert.

        Returns:
            (T, E), zero where a token does not use an expert; their sum where two slots name the same one, as a hash
            table of a backbone may.
        """
        if self.experts is None:
            return self.weights
        gates_TE = self.weights.new_zeros(*self.weights.shape[:-1], self.num_experts + 1)
        return gates_TE.scatter_add(-1, self.experts, self.weights)[..., :-1]

    def request_matrix(self) -> torch.Tensor:
        """Which experts each valid token asked for, before any capacity.

        Returns:
            (T, E) float32 of zeros and ones; rows of padding are zero. A dense decision asks for the experts to which
            it gives a weight.
        """
        if self.experts is None:
            requests_TE = (self.weights.detach() != 0).to(self.probs.dtype)
        else:
            requests_TE = self.probs.new_zeros(*self.experts.shape[:-1], self.num_experts + 1)
            requests_TE = requests_TE.scatter_(-1, self.experts, 1.0)[..., :-1]
        return requests_TE if self.valid is None else requests_TE * self.valid[:, None]


class RouterLoss(Part):
    """A loss on a routing that is a function of sums, so that batches which no process sees whole can be joined.

    loss(A and B together) = value(sums(A) + sums(B))

    Attributes:
        config_fields: Keyword of the constructor -> field of the configuration that gives it its value.
        additive: Whether sums over the slices of a batch, by positions, add up to those of the whole.
        adapts: Whether its coefficient follows what the routers decide, so that training passes are counted for it.
        of_softmax: Whether it is about the softmax's normaliser, so that it says nothing of other gates.
    """

    config_fields: ClassVar[Mapping[str, str]] = {}
    additive: bool = True
    adapts: bool = False
    of_softmax: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let no class inherit that its sums take several places: sums of its own may take one."""
        super().__init_subclass__(**kwargs)
        if "sums" in cls.__dict__ and "stacks_by" not in cls.__dict__:
            cls.stacks_by = RouterLoss.stacks_by  # type: ignore[method-assign]

    def stacks_by(self) -> Hashable | None:
        """What losses of this class must have in common for `sums` of one to measure the places of all.

        Where it is not None, `sums` also takes a routing whose tensors have a first dimension of P places, which share
        a context, and returns (P, N).
        """
        return None

    def adapt(self, coefficient: float, statistics: Sequence[StepStatistics]) -> float:
        """The coefficient for the next step; called after each optimizer step where `adapts`.

        Args:
            coefficient: That of the step that has ended.
            statistics: Of all places of the adapter that have this loss.
        """
        return coefficient

    def sums(self, routing: Routing) -> torch.Tensor:
        """Sum what the loss needs over the valid tokens, or over the sequences.

        Args:
            routing: Decision for T tokens.

        Returns:
            (N,) sums, N being the same for every batch; they carry the graph of the routing.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what it sums.")

    @staticmethod
    def value(sums: torch.Tensor) -> torch.Tensor:
        """Turn sums into the loss; the same function for all instances of a class.

        Args:
            sums: (..., N), one row per layer.

        Returns:
            (...) unscaled losses.
        """
        raise NotImplementedError("A RouterLoss needs a value of its sums.")

    def __call__(self, routing: Routing) -> torch.Tensor:
        """The 0-d unscaled loss of one batch."""
        return self.value(self.sums(routing))
