"""Routing by a hash of the token's id: a token always goes to the same expert, and nothing is learned.

    z_e = 1 for e = hash(id), and so low for the others that their probability is zero

Hash layers (Roller et al., arXiv 2106.04426, the random form with one hash). With `router="dense"` under a softmax the
expert's weight is one. The hash is a multiplication: it needs no table, and is the same in every run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..part import Option
from ..types import TokenContext
from .router import Router, RouterArgs
from .task_table import MASKED

if TYPE_CHECKING:
    from typing_extensions import Unpack


def hash_of(ids_T: torch.Tensor, seed: int, num_values: int) -> torch.Tensor:
    """A number for each token id, evenly spread.

    Two rounds of multiplication modulo 2^32 with a fold between them, of whose bits the upper ones count.

    Args:
        ids_T: (T,) token ids.
        seed: Which of the hashes.
        num_values: Numbers are from zero to one less than it.

    Returns:
        (T,) int64.
    """
    mixed_T = (ids_T.long() + 1) * 2654435761 % 2**32
    mixed_T = (mixed_T ^ (mixed_T >> 15) ^ (seed * 40503)) * 668265263 % 2**32
    return (mixed_T >> 12) % num_values


def ids_of(context: TokenContext, owner: str) -> torch.Tensor:
    """(T,) ids of the tokens.

    Args:
        context: What is known about the tokens.
        owner: Name of the class that asks.

    Raises:
        ValueError: The batch brings no ids.
    """
    if context.token_ids is None:
        raise ValueError(
            f"{owner} decides by the tokens' ids, and this call has none for these tokens: give the model input_ids "
            "instead of inputs_embeds, and adapt modules of its text alone."
        )
    return context.token_ids


class TokenHash(Router):
    """Scores by the token's id.

    Args:
        in_features: Taken for the signature that scorers share.
        num_experts: E.
        hash_seed: Which of the hashes.
        init_std: Taken for the signature that scorers share.
        **shared: See `Router`.
    """

    reads = "token_ids"
    context_needs = frozenset({"token_ids"})
    separable = False  # a hash counts the experts
    gives = frozenset()
    options = (
        Option(
            "hash_seed",
            0,
            "a whole number from 0 to 65536",
            lambda value: type(value) is int and 0 <= value <= 2**16,
            "Which of the hashes of token ids.",
        ),
    )

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        hash_seed: int = 0,
        init_std: float | None = None,
        **shared: Unpack[RouterArgs],
    ) -> None:
        super().__init__(in_features, num_experts, **shared)
        self.hash_seed = hash_seed

    def scores(self, x: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Score one expert for each token; arguments as in `Router.scores`.

        Raises:
            ValueError: The batch brings no ids.
        """
        ids_T = ids_of(context, type(self).__name__).to(x.device)
        dtype = torch.promote_types(x.dtype, torch.float32)
        z_TE = torch.full((len(ids_T), self.num_experts), MASKED, dtype=dtype, device=x.device)
        return z_TE.scatter(-1, hash_of(ids_T, self.hash_seed, self.num_experts)[:, None], 1.0)
