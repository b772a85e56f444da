"""Top-k routing with a capacity: in training an expert takes only its first C tokens of a sequence.

    C = max(1, ceil(capacity_factor * K * n / E))        n valid tokens of the sequence

A (token, expert) pair over capacity is dropped: its weight is zero, and a token without any expert left is encoded by
the base layer alone (GShard, arXiv 2006.16668; SiRA, arXiv 2311.09179). Padding takes no place, and documents of a
packed row count on their own. Outside training passes there is no capacity, so that decoding equals the full forward.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import overload

import torch
from torch.nn import functional as F

from ..types import Routing, TokenContext
from .gates import Gate
from .linear import LinearRouter
from .top_k import TopK
from .whole_rows import check_whole_rows


class Capacity(TopK):
    """The k largest, of which experts take only so many in training passes.

    Args:
        top_k: K, experts a token uses.
        capacity_factor: Ratio of an expert's places to its even share of the requests; None means no capacity.
        capacity_order: Who is served first. "position": tokens in sequence order, which keeps the router causal.
            "choice": all first choices before all second choices (GShard); "probability": those with the largest
            probability first (V-MoE, arXiv 2106.05974). With both a later token can take an earlier token's place.
        norm_topk_prob: See `TopK`; weights are rescaled before tokens are dropped.
        expert_dropout: See `TopK`.
    """

    fields = ("capacity_factor", "capacity_order", *TopK.fields)
    varies = frozenset({"capacity_factor"})

    def __init__(
        self,
        *,
        top_k: int,
        capacity_factor: float | None = None,
        capacity_order: str = "position",
        norm_topk_prob: bool = False,
        expert_dropout: float = 0.0,
    ) -> None:
        super().__init__(top_k=top_k, norm_topk_prob=norm_topk_prob, expert_dropout=expert_dropout)
        self.capacity_factor = capacity_factor
        self.capacity_order = capacity_order
        self.causal = capacity_order == "position"

    def gates(self, probs_TE: torch.Tensor) -> torch.Tensor | None:
        """Those of the k largest, as there is no capacity outside of training passes; see `Selector.gates`."""
        return super().gates(probs_TE)

    def __call__(
        self,
        logits_TE: torch.Tensor,
        probs_TE: torch.Tensor,
        context: TokenContext,
        num_experts: int,
        **own: torch.Tensor,
    ) -> Routing:
        """Keep the k largest probabilities, then drop what is over capacity; arguments as in `Selector`."""
        routing = super().__call__(logits_TE, probs_TE, context, num_experts, **own)
        if self.capacity_factor is None or not context.training:
            return routing
        why = "an expert's places are those of whole rows"
        check_whole_rows(context, f"capacity_factor={self.capacity_factor}", why, "capacity_factor=None")
        if self.capacity_order == "probability":
            dropped_TK = over_capacity_by_score(routing, self.capacity_factor)
        else:
            dropped_TK = over_capacity(routing, self.capacity_factor, by_choice=self.capacity_order == "choice")
        return replace(routing, weights=routing.weights.masked_fill(dropped_TK, 0.0), dropped=dropped_TK)


class CapacityRouter(LinearRouter):
    """Linear scores, softmax, the k largest within the experts' capacity.

    Args:
        in_features: D, width of the input.
        num_experts: E.
        top_k: See `Capacity`.
        capacity_factor: See `Capacity`.
        capacity_order: See `Capacity`.
        norm_topk_prob: See `Capacity`.
        gate: See `LinearRouter`.
        routed_scaling_factor: See `LinearRouter`.
        router_jitter_noise: See `LinearRouter`.
        expert_dropout: See `LinearRouter`.
        init_std: See `LinearRouter`.
    """

    fields: tuple[str, ...] = ("capacity_factor", "capacity_order", "top_k", "norm_topk_prob", *LinearRouter.fields)

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        top_k: int,
        capacity_factor: float | None = None,
        capacity_order: str = "position",
        norm_topk_prob: bool = False,
        gate: Gate | None = None,
        routed_scaling_factor: float = 1.0,
        router_jitter_noise: float = 0.0,
        expert_dropout: float = 0.0,
        init_std: float | None = None,
    ) -> None:
        select = Capacity(
            top_k=top_k,
            capacity_factor=capacity_factor,
            capacity_order=capacity_order,
            norm_topk_prob=norm_topk_prob,
            expert_dropout=expert_dropout,
        )
        super().__init__(
            in_features,
            num_experts,
            select=select,
            gate=gate,
            routed_scaling_factor=routed_scaling_factor,
            router_jitter_noise=router_jitter_noise,
            expert_dropout=expert_dropout,
            init_std=init_std,
        )


def over_capacity(routing: Routing, capacity_factor: float, *, by_choice: bool = False) -> torch.Tensor:
    """Which (token, slot) pairs find their expert full.

    Args:
        routing: Top-k decision before any capacity.
        capacity_factor: Ratio of an expert's places to its even share of the requests.
        by_choice: Whether all first choices are served before all second choices, instead of tokens in order.

    Returns:
        (T, K) bool. Pairs of padding and slots without an expert are never dropped.
    """
    experts_TK, context = routing.experts, routing.context
    assert experts_TK is not None
    if context.num_sequences == context.num_rows and not torch.compiler.is_compiling():
        return _over_capacity_of_rows(routing, capacity_factor, by_choice)
    (num_tokens, top_k), num_experts = experts_TK.shape, routing.num_experts
    sequences_T = context.sequences
    if sequences_T is None:
        sequences_T = experts_TK.new_zeros(num_tokens)
    valid_T = torch.ones_like(sequences_T, dtype=torch.bool) if routing.valid is None else routing.valid
    lengths_S = sequences_T.new_zeros(context.num_sequences).index_add(0, sequences_T, valid_T.long())
    capacity_S = places(lengths_S, capacity_factor * top_k, num_experts)

    # Requests in the order in which they are served, as one-hot rows; a column E takes slots without an expert.
    order = experts_TK.T.reshape(-1) if by_choice else experts_TK.reshape(-1)
    repeat = (lambda t: t.repeat(top_k)) if by_choice else (lambda t: t.repeat_interleave(top_k))
    owner, counts = repeat(sequences_T), repeat(valid_T)
    requests = torch.zeros(order.numel(), num_experts + 1, dtype=torch.long, device=order.device)
    requests.scatter_(1, order[:, None], counts.long()[:, None])

    rank = rank_in_sequence(requests, owner, context.num_sequences, contiguous=not by_choice)
    rank = rank.gather(1, order[:, None]).squeeze(1)
    full = (rank > capacity_S[owner]) & counts & (order < num_experts)
    return full.view(top_k, num_tokens).T if by_choice else full.view(num_tokens, top_k)


def _over_capacity_of_rows(routing: Routing, capacity_factor: float, by_choice: bool) -> torch.Tensor:
    """The same where each row of the batch is one sequence: one running count along the rows."""
    experts_TK, num_rows, num_experts = routing.experts, routing.context.num_rows, routing.num_experts
    assert experts_TK is not None
    num_tokens, top_k = experts_TK.shape
    length = num_tokens // num_rows
    experts_BLK = experts_TK.view(num_rows, length, top_k)
    order_BN = (experts_BLK.mT if by_choice else experts_BLK).reshape(num_rows, -1)  # as they are served
    requests = torch.zeros(*order_BN.shape, num_experts + 1, dtype=torch.int32, device=order_BN.device)
    lengths_B: torch.Tensor | int = length
    if routing.valid is None:
        requests.scatter_(2, order_BN[..., None], 1)
    else:
        valid_BL = routing.valid.view(num_rows, length)
        lengths_B = valid_BL.sum(1, keepdim=True)
        counted_BN = valid_BL.repeat(1, top_k) if by_choice else valid_BL.repeat_interleave(top_k, dim=1)
        requests.scatter_(2, order_BN[..., None], counted_BN.int()[..., None])
    rank_BN = requests.cumsum(1, dtype=torch.int32).gather(2, order_BN[..., None]).squeeze(2)
    full_BN = (rank_BN > places(lengths_B, capacity_factor * top_k, num_experts)) & (order_BN < num_experts)
    full_BLK = full_BN.view(num_rows, top_k, length).mT if by_choice else full_BN.view(num_rows, length, top_k)
    full_TK = full_BLK.reshape(num_tokens, top_k)
    return full_TK if routing.valid is None else full_TK & routing.valid[:, None]


def over_capacity_by_score(routing: Routing, capacity_factor: float) -> torch.Tensor:
    """Which (token, slot) pairs find their expert full where those with the largest probability are served first.

    Args:
        routing: Top-k decision before any capacity.
        capacity_factor: Ratio of an expert's places to its even share of the requests.

    Returns:
        (T, K) bool. Pairs of padding and slots without an expert are never dropped.
    """
    experts_TK, num_experts = routing.experts, routing.num_experts
    assert experts_TK is not None
    asked_TE = routing.request_matrix().bool()
    scores_TE = routing.probs.detach().masked_fill(~asked_TE, -1.0)
    rank_TE, lengths_S, owner_T = rank_by_score(scores_TE, routing.context)
    capacity_T = places(lengths_S, capacity_factor * experts_TK.shape[1], num_experts)[owner_T]
    full_TE = F.pad((rank_TE > capacity_T[:, None]) & asked_TE, (0, 1))
    full_TK = full_TE.gather(1, experts_TK)
    return full_TK if routing.valid is None else full_TK & routing.valid[:, None]


def rank_by_score(scores_TE: torch.Tensor, context: TokenContext) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Place of each token of a sequence when they are sorted by their score, largest first, for each expert.

    Args:
        scores_TE: (T, E) scores; equal ones keep the order of the tokens.
        context: Padding comes after all other tokens of its sequence.

    Returns:
        (T, E) int64 place, starting at one; (S,) number of valid tokens of each sequence; (T,) sequence of each token.
    """
    num_tokens = scores_TE.shape[0]
    owner_T = context.sequences
    if owner_T is None:
        owner_T = torch.zeros(num_tokens, dtype=torch.long, device=scores_TE.device)
    valid_T = torch.ones_like(owner_T, dtype=torch.bool) if context.valid is None else context.valid
    scores_TE = scores_TE.masked_fill(~valid_T[:, None], -torch.inf)
    by_score_TE = scores_TE.sort(dim=0, descending=True, stable=True).indices
    by_owner_TE = owner_T[by_score_TE].sort(dim=0, stable=True).indices
    order_TE = by_score_TE.gather(0, by_owner_TE)  # sequences stand together, as their index does not decrease
    sizes_S = owner_T.new_zeros(context.num_sequences).index_add(0, owner_T, torch.ones_like(owner_T))
    place_T = torch.arange(1, num_tokens + 1, device=owner_T.device) - (sizes_S.cumsum(0) - sizes_S)[owner_T]
    rank_TE = torch.zeros_like(order_TE).scatter(0, order_TE, place_T[:, None].expand_as(order_TE))
    lengths_S = torch.zeros_like(sizes_S).index_add(0, owner_T, valid_T.long())
    return rank_TE, lengths_S, owner_T


@overload
def places(lengths: torch.Tensor, requests_per_token: float, num_experts: int) -> torch.Tensor: ...
@overload
def places(lengths: int | torch.Tensor, requests_per_token: float, num_experts: int) -> int | torch.Tensor: ...
def places(lengths: int | torch.Tensor, requests_per_token: float, num_experts: int) -> int | torch.Tensor:
    """C, the tokens that an expert takes of a sequence.

    Args:
        lengths: Valid tokens of sequences.
        requests_per_token: Requests of a token, times the capacity factor.
        num_experts: E.

    Returns:
        max(1, ceil(requests_per_token * lengths / num_experts)).
    """
    # The small term keeps a product that is whole but for rounding from taking one place more.
    if isinstance(lengths, int):
        return max(1, math.ceil(requests_per_token * lengths / num_experts - 1e-9))
    return (requests_per_token * lengths.double() / num_experts - 1e-9).ceil().clamp_min(1).long()


def rank_in_sequence(
    requests: torch.Tensor, owner: torch.Tensor, num_sequences: int, *, contiguous: bool
) -> torch.Tensor:
    """Running count of the requests for each expert within the sequence that owns them, starting at one.

    Args:
        requests: (N, E) int64 requests in the order in which they are served.
        owner: (N,) int64 sequence of each.
        num_sequences: S.
        contiguous: Whether the requests of a sequence stand together.

    Returns:
        (N, E) int64.
    """
    if not contiguous:
        ranks = torch.zeros_like(requests)
        for s in range(num_sequences):
            own = requests * (owner == s)[:, None]
            ranks = torch.where((owner == s)[:, None], own.cumsum(0), ranks)
        return ranks
    per_sequence = requests.new_zeros(num_sequences, requests.shape[1]).index_add(0, owner, requests)
    before = per_sequence.cumsum(0) - per_sequence
    return requests.cumsum(0) - before[owner]
