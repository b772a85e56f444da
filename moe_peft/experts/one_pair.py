"""What kinds of experts share that have both matrices in common and differ between them: y = base + s B M_e A x."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from .one_down import OneDownExperts
from .ranked import PairSizes, start_pair

if TYPE_CHECKING:
    from typing_extensions import Unpack


class OnePairExperts(OneDownExperts):
    """Base of banks whose experts differ in what stands between a down and an up matrix.

    Args:
        in_features: D, width of the input.
        out_features: O, width of the output.
        init_weights: See `start_pair`.
        **common: See `OneDownExperts`.

    Attributes:
        A: (r, D) down matrix.
        B: (r, O) up matrix, stored transposed.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        init_weights: bool | str = True,
        **common: Unpack[PairSizes],
    ) -> None:
        super().__init__(in_features, **common)
        r = self.A.shape[0]
        self.make_between(self.num_choices, r)
        self.B = nn.Parameter(torch.empty(r, out_features))
        start_pair(self.A, self.B, init_weights)

    def make_between(self, num_experts: int, r: int) -> None:
        """Make and initialise the parameters of what stands between the matrices; called once, by the constructor.

        Args:
            num_experts: E.
            r: Rank.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what stands between its matrices.")

    def delta_weight(self, weights_E: torch.Tensor) -> torch.Tensor:
        """S B (sum_e w_e M_e) A, (O, D); see `Experts.delta_weight`."""
        A_rD, B_Or = self.delta_factors(weights_E)
        return B_Or @ A_rD
