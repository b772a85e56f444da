"""Numbers about shares of experts: how far distributions are apart, and how many experts a distribution uses."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch


def pair_divergences(shares_GE: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence of each pair of distributions over experts, over its maximum log 2.

        (H((p + q) / 2) - (H(p) + H(q)) / 2) / log 2            (Lin, IEEE Trans. Inf. Theory 37(1), 1991)

    Args:
        shares_GE: (G, E) rows that sum to one, of G groups.

    Returns:
        (G, G) float64 in [0, 1]: 0 where both use the experts alike, 1 where they share none.
    """
    shares_GE = shares_GE.double()
    own_G = torch.special.entr(shares_GE).sum(-1)
    mixed_GG = torch.special.entr((shares_GE[:, None] + shares_GE) / 2).sum(-1)
    return ((mixed_GG - (own_G[:, None] + own_G) / 2) / math.log(2)).clamp(0, 1)


def divergence(shares_GE: torch.Tensor) -> float:
    """Mean over the pairs of groups of `pair_divergences`.

    Args:
        shares_GE: (G, E) rows that sum to one, of G groups.

    Returns:
        In [0, 1]; NaN for fewer than two groups.
    """
    count = len(shares_GE)
    if count < 2:
        return float("nan")
    return float(pair_divergences(shares_GE).triu(1).sum()) / (count * (count - 1) / 2)


def effective_experts(shares_E: torch.Tensor) -> float:
    """Number of equally used experts that have the same entropy: exp(H(p)).

    Args:
        shares_E: (E,) shares that sum to one.

    Returns:
        In [1, E]; 0 where there is no share at all.
    """
    shares_E = shares_E.double()
    return float(torch.special.entr(shares_E).sum().exp()) if float(shares_E.sum()) > 0 else 0.0


def relative_entropy(shares_E: torch.Tensor) -> float:
    """Entropy of shares over its maximum log E: one when even, zero when collapsed; one for a single expert.

    Args:
        shares_E: (E,) shares that sum to one.
    """
    if len(shares_E) < 2:
        return 1.0
    return float(torch.special.entr(shares_E.double()).sum()) / math.log(len(shares_E))


def known_mean(values: Iterable[float]) -> float:
    """Mean of the numbers that are known; NaN where there is none.

    Args:
        values: Numbers, NaN where one is not known.
    """
    known = [value for value in values if value == value]
    return sum(known) / len(known) if known else math.nan
