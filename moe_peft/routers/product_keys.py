"""An expert for each pair of two choices, scored by the sum of theirs: z_(i,j) = (U x)_i + (V x)_j.

PEER (He, arXiv 2407.04153), whose product keys score E experts by about 2 sqrt(E) vectors; under a softmax the
probability of a pair is the product of the probabilities of its members. The paper splits a query in two halves, of
which each reads one set of keys; here both read the input. Experts are numbered row by row, e = i E2 + j.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..ops import divisor_below_root, project
from ..part import Option
from ..types import TokenContext
from .linear import LinearArgs, LinearRouter

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ProductKeys(LinearRouter):
    """Scores pairs by two matrices.

    Args:
        in_features: D, width of the input.
        num_experts: E.
        first_keys: Rows of U, which divide E; None takes the largest divisor up to the root of E.
        init_std: See `LinearRouter`.
        **shared: See `LinearRouter`.

    Attributes:
        weight: U over V, (E1 + E2, D) with E1 E2 = E.
    """

    gives = frozenset()  # further columns of selectors are no pairs
    separable = False  # a row belongs to several experts
    options = (
        Option(
            "first_keys",
            None,
            "a whole number from 1 to 65536 that divides num_experts, or None",
            lambda value: value is None or (type(value) is int and 1 <= value <= 2**16),
            "First choices of a pair, E1; None for the largest divisor of E up to its root.",
        ),
    )

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        first_keys: int | None = None,
        init_std: float | None = None,
        **shared: Unpack[LinearArgs],
    ) -> None:
        super().__init__(in_features, num_experts, init_std=init_std, **shared)
        self.first_keys = first_keys or divisor_below_root(num_experts)
        rows = self.first_keys + num_experts // self.first_keys
        self.weight = nn.Parameter(torch.empty(rows, in_features, dtype=torch.float32))
        if init_std is None:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        else:
            nn.init.normal_(self.weight, std=init_std)

    @classmethod
    def misfit(cls, options: Mapping[str, Any], sizes: Mapping[str, int]) -> str | None:
        """See `Part.misfit`."""
        first, num_experts = options["first_keys"], sizes["num_experts"]
        if first is None or num_experts % first == 0:
            return None
        return f"first_keys={first} must divide num_experts={num_experts}"

    def scores(self, x: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Score the experts for each token; arguments as in `Router.scores`."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        keys_T = project(self.jittered(x.to(dtype), context), self.weight, dtype=dtype)
        first_TU, second_TV = keys_T.split([self.first_keys, self.weight.shape[0] - self.first_keys], dim=-1)
        return (first_TU[:, :, None] + second_TV[:, None]).flatten(1)
