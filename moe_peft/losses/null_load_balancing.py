"""Load balancing with null experts: the share of slots that hold nothing follows from their number.

    loss = (E + m) (sum_e f_e P_e + sum over the m nulls of f P)
    f_e   share of all K n slots that expert e gets;  f of a null: the mean over the nulls of theirs
    P_e   mean over valid tokens of p_e

AdaMoE (Zeng et al., arXiv 2406.13233). Balance gives every column 1 / (E + m), so that m / (E + m) of the slots hold
nothing, whichever nulls they are. The gradient flows through P alone.
"""

from __future__ import annotations

import torch

from ..types import RouterLoss, Routing
from .masking import masked_sum, num_valid


class NullLoadBalancing(RouterLoss):
    """Balance of a router that may choose nothing; one when balanced."""

    needs = frozenset({"selection", "null_probs"})

    def stacks_by(self) -> tuple[()]:
        """Any; see `RouterLoss.stacks_by`."""
        return ()

    def sums(self, routing: Routing) -> torch.Tensor:
        """(..., 2E + 4) requests for each expert and its summed probability; those of all nulls, n, and m n."""
        null_probs, tokens = routing.extras["null_probs"], num_valid(routing)
        requests_E, probs_E = routing.request_matrix().sum(-2), masked_sum(routing.probs, routing)
        null_requests = tokens * routing.weights.shape[-1] - requests_E.sum(-1)
        null_mass = masked_sum(null_probs, routing).sum(-1)
        counts = [own.expand_as(null_mass) for own in (tokens, tokens * null_probs.shape[-1])]
        return torch.cat([requests_E, probs_E, torch.stack([null_requests, null_mass, *counts], dim=-1)], dim=-1)

    @staticmethod
    def value(sums: torch.Tensor) -> torch.Tensor:
        """(...) loss of (..., 2E + 4) sums."""
        requests_E, probs_E = sums[..., :-4].chunk(2, -1)
        null_requests, null_mass, tokens, weighted = sums[..., -4:].unbind(-1)
        tokens = tokens.clamp_min(1)
        num_null, slots = weighted / tokens, (requests_E.sum(-1) + null_requests).clamp_min(1)
        # Each null has the mean share of requests, so their products sum to it times their summed probability.
        balance = (requests_E * probs_E).sum(-1) + null_requests / num_null.clamp_min(1) * null_mass
        return (requests_E.shape[-1] + num_null) * balance / (slots * tokens)
