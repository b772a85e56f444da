"""The nearest pair of a smaller rank to a sum of pairs, found without the matrix that it stands for (Eckart, Young).

    B = Q S,   A' = P R   (QR of the factors),   S R' = U diag(z) V',   B_k = Q U_k diag(z_k),   A_k = V_k' P'

The largest decomposition is of an (R, R) matrix, R the sum of the ranks.
"""

from __future__ import annotations

import torch


def truncated(A_RD: torch.Tensor, B_OR: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Truncate B A to a rank.

    Args:
        A_RD: (R, D) down matrices, one below the other.
        B_OR: (O, R) up matrices, side by side.
        rank: The rank wanted; a smaller one is taken where the product has no larger one.

    Returns:
        A (k, D) and B (O, k) with k = min(rank, R, D, O), in the dtype that came, and the share of the product's
        Frobenius norm that is lost.
    """
    P_DR, R_RR = torch.linalg.qr(A_RD.double().T)
    Q_OR, S_RR = torch.linalg.qr(B_OR.double())
    U, z, V = torch.linalg.svd(S_RR @ R_RR.T, full_matrices=False)
    k = min(rank, len(z))
    whole = float(z.square().sum())
    lost = float(z[k:].square().sum())
    A_kD, B_Ok = V[:k] @ P_DR.T, Q_OR @ (U[:, :k] * z[:k])
    return A_kD.to(A_RD), B_Ok.to(B_OR), (lost / whole) ** 0.5 if whole else 0.0


def cosine(first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Cosine of two products B A as vectors, of their factors alone; 0 where one of them is zero.

    Args:
        first: A (r, D) and B (O, r).
        second: The same of another pair, of any rank.
    """
    dot, one, other = (
        float(((b.double().T @ d.double()) * (a.double() @ c.double().T)).sum())
        for (a, b), (c, d) in ((first, second), (first, first), (second, second))
    )
    # The product of the two may leave the range of a float, or fall to zero.
    return dot / one**0.5 / other**0.5 if one > 0 and other > 0 else 0.0
