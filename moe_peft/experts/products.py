"""Inner products of matrices that are given by their factors, without the matrices.

<B_e A_e, B_f A_f> = tr(A_e' B_e' B_f A_f) = sum_ij (B_e' B_f)_ij (A_e A_f')_ij
"""

from __future__ import annotations

import torch


@torch.no_grad()
def pair_products(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Inner products of the products of low-rank pairs.

    Args:
        A: (E, r, I) down matrices, or (r, I) of one that all share.
        B: (E, r, O) up matrices, stored transposed.

    Returns:
        (E, E) float64, <B_e A_e, B_f A_f>.
    """
    A, B = A.double(), B.double()
    num_experts, r = B.shape[:2]
    blocks = (num_experts, r, num_experts, r)
    ups = (B.flatten(0, 1) @ B.flatten(0, 1).T).view(blocks)
    if A.dim() == 2:
        return (ups * (A @ A.T)[None, :, None]).sum((1, 3))
    downs = (A.flatten(0, 1) @ A.flatten(0, 1).T).view(blocks)
    return (ups * downs).sum((1, 3))
