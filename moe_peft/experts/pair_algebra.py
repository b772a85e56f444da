"""What pairs of matrices are as matrices: D_e = s B_e A_e, their inner products, sums, means and directions.

The matrices are never built but for `delta_weight`.
"""

from __future__ import annotations

import torch
from torch import nn

from .experts import Experts
from .products import pair_products


class PairAlgebra(Experts):
    """Base of banks with A (E + S, r, D) and B (E + S, r, O), of which the last S are shared experts.

    A kind with something between the two matrices, or after them, is compared by its pairs all the same.
    """

    A: nn.Parameter
    B: nn.Parameter
    scaling: float
    shared: int
    # Whether a kind reads and combines as pairs do.
    _as_defined: bool = True

    def directions(self) -> torch.Tensor:
        """Right singular vectors of B_e A_e with the largest singular value; see `Experts.directions`.

        B A = (P S) (Q R)' with orthogonal P and Q, so that the decomposition is that of an (r, r) matrix.
        """
        if not self._as_defined:
            return super().directions()
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        A, B = (tensor[: self.num_choices].to(dtype) for tensor in (self.A, self.B))
        if not B.flatten(1).any(-1).all():
            raise ValueError(f"{type(self).__name__}: an expert's up matrix is zero, so that it answers nothing yet.")
        (Q_EDr, R_Err), (_, S_Err) = torch.linalg.qr(A.mT), torch.linalg.qr(B.mT)
        right_Err = torch.linalg.svd(S_Err @ R_Err.mT).Vh
        return (Q_EDr @ right_Err[:, 0, :, None]).squeeze(-1)

    def delta_products(self) -> torch.Tensor:
        """Inner products of the matrices s B_e A_e; see `Experts.delta_products`."""
        return self.scaling**2 * pair_products(self.A[: self.num_choices], self.B[: self.num_choices])

    def even_out(self) -> None:
        """Give all rows of A the norm that they have in the mean; see `Experts.even_out`."""
        with torch.no_grad():
            norms = torch.linalg.vector_norm(self.A, dim=-1, keepdim=True)
            self.A.mul_(norms.mean() / norms)

    def delta_factors(self, weights_E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All A_e one below the other, and all s w_e B_e side by side; see `Experts.delta_factors`."""
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        weights_E = torch.cat([weights_E.to(dtype), torch.ones(self.shared, dtype=dtype, device=weights_E.device)])
        B_RO = (self.B.to(dtype) * weights_E.to(self.B.device)[:, None, None]).reshape(-1, self.B.shape[-1])
        return self.A.to(dtype).reshape(-1, self.A.shape[-1]), self.scaling * B_RO.T

    def mean_factors(self, weights_E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Means of A_e and of s B_e, the latter times sum w_e, and shared pairs below; see `Experts.mean_factors`."""
        dtype, E = torch.promote_types(self.A.dtype, torch.float32), self.num_choices
        A, B, weights = self.A.to(dtype), self.scaling * self.B.to(dtype), weights_E.to(self.A.device, dtype)
        total = weights.sum()
        shares = weights / total if total != 0 else weights
        A_rD, B_rO = (torch.einsum("e,erd->rd", own, of) for own, of in ((shares, A[:E]), (weights, B[:E])))
        return torch.cat([A_rD, *A[E:]]), torch.cat([B_rO, *B[E:]]).T

    def delta_weight(self, weights_E: torch.Tensor) -> torch.Tensor:
        """S * sum_e w_e B_e A_e; arguments as in `Experts.delta_weight`."""
        A_RD, B_OR = self.delta_factors(weights_E)
        return B_OR @ A_RD
