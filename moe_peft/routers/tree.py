"""Routing down a binary tree: at each node a token goes left or right, and the leaves are the experts.

    z_e = sum over the nodes n above leaf e of log sigmoid(+-(w_n x + b_n)),   so that softmax(z)_e is the chance of e

Fast feedforward networks (Belcak and Wattenhofer, arXiv 2308.14711), soft under `router="dense"`; `top_k` with one
expert takes the likeliest leaf. The entropy of the leaves is the sum of the nodes' entropies, each weighed by how many
tokens come there, so that `token_entropy` is the paper's hardening loss in that form. With a shared expert (arXiv
2405.16836) the master leaf is added to the routed ones.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from ..ops import project
from ..types import TokenContext
from .router import Router, RouterArgs

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Tree(Router):
    """Scores by decisions at the nodes of a tree with E leaves, balanced where E is a power of two.

    Args:
        in_features: D, width of the input.
        num_experts: E.
        init_std: Standard deviation of the nodes' vectors at the start; None takes the uniform one of `nn.Linear`.
        **shared: See `Router`.

    Attributes:
        weight: (E - 1, D) vectors of the nodes, each before those below it; one of no effect where E is one.
        offset: (E - 1,) b.
    """

    gives = frozenset()
    log_scores = True
    separable = False  # a node is above several leaves
    learns = True

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        init_std: float | None = None,
        **shared: Unpack[RouterArgs],
    ) -> None:
        super().__init__(in_features, num_experts, **shared)
        num_nodes = max(num_experts - 1, 1)
        self.weight = nn.Parameter(torch.empty(num_nodes, in_features))
        self.offset = nn.Parameter(torch.zeros(num_nodes))
        if init_std is None:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        else:
            nn.init.normal_(self.weight, std=init_std)

    def scores(self, x: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Logarithm of each leaf's chance, for each token; arguments as in `Router.scores`."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        u_TN = project(x, self.weight, dtype=dtype) + self.offset.to(dtype)
        both_TM = F.logsigmoid(torch.cat([u_TN, -u_TN], dim=-1))
        paths_EM = torch.tensor(paths(self.num_experts), dtype=dtype, device=x.device)
        return project(both_TM, paths_EM)


def paths(num_leaves: int) -> list[list[int]]:
    """Which turns lead to each leaf, in a tree whose node n has the children 2n + 1 and 2n + 2.

    Args:
        num_leaves: E; the leaves come after the E - 1 nodes.

    Returns:
        For each leaf ones at its turns: first the left turn at each node, then the right ones.
    """
    num_nodes = max(num_leaves - 1, 1)
    found = []
    for leaf in range(num_leaves):
        turns, child = [0] * (2 * num_nodes), leaf + num_leaves - 1
        while child > 0:
            parent = (child - 1) // 2
            turns[parent + (num_nodes if child % 2 == 0 else 0)] = 1
            child = parent
        found.append(turns)
    return found
