"""Trainable copies of some of a backbone's experts, the whole matrices of each: y = base + sum_k w_k FFN_{i_k}(x).

The sum runs over the slots whose expert was copied (ESFT, arXiv 2407.01906).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from ..part import ModulePart

# (tensors, x_TD, experts_TK, weights_TK) -> (T, O), the backbone's own computation on other tensors.
Compute = Callable[[Mapping[str, torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class ExpertSlices(ModulePart, nn.Module):
    """The selected slices of fused expert tensors, under the backbone's own names and in its own layout.

    Args:
        tensors: Name -> (E, ...) tensor of the backbone.
        ids: Selected experts, n of them, ascending.

    Attributes:
        mergeable: They replace what they were copied from.
    """

    mergeable = True
    splits = True

    def __init__(self, tensors: Mapping[str, torch.Tensor], ids: Sequence[int]) -> None:
        super().__init__()
        self.num_experts = len(ids)
        for name, tensor in tensors.items():
            shape = (len(ids), *tensor.shape[1:])
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=tensor.dtype)))
        self.copy_from(tensors, ids)

    def hold(self, num_experts: int) -> None:
        """See `ModulePart.hold`."""
        self.num_experts = num_experts

    @torch.no_grad()
    def copy_from(self, tensors: Mapping[str, torch.Tensor], ids: Sequence[int]) -> None:
        """Take the values of the backbone's experts, unless either side holds none (meta device)."""
        for name, parameter in self.named_parameters():
            if not (parameter.is_meta or tensors[name].is_meta):
                parameter.copy_(tensors[name][list(ids)])

    def forward(
        self,
        x_TD: torch.Tensor,
        base_out_TO: torch.Tensor,
        experts_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        compute: Compute,
    ) -> torch.Tensor:
        """Add the weighted sum of the copies to the output of the frozen experts.

        Every parameter takes part in every call with gradients, as data-parallel training expects, and is read inside
        this call, before which sharded training gathers it.

        Args:
            x_TD: (T, D) input.
            base_out_TO: (T, O) output of the experts that were not copied.
            experts_TK: (T, K) place of each slot's expert among the copies; n where it is none of them.
            weights_TK: (T, K) combine weights.
            compute: The backbone's computation of experts, given their tensors.

        Returns:
            (T, O) in the dtype of `base_out_TO`.
        """
        tensors: dict[str, torch.Tensor] = dict(self.named_parameters())
        hit_TK = experts_TK < self.num_experts
        if torch.compiler.is_compiling():
            # Shapes must not depend on the routing: every slot runs, those of other experts with weight zero.
            experts_TK, weights_TK = experts_TK.masked_fill(~hit_TK, 0), weights_TK.masked_fill(~hit_TK, 0.0)
            return base_out_TO + compute(tensors, x_TD, experts_TK, weights_TK).to(base_out_TO.dtype)
        rows, slots = hit_TK.nonzero(as_tuple=True)
        if rows.numel() == 0:
            if not torch.is_grad_enabled():
                return base_out_TO
            # Sums of nothing: gradients of zero without reading the copies.
            zeros = [tensor.flatten()[:0].sum() for tensor in tensors.values()]
            return base_out_TO + torch.stack(zeros).sum().to(base_out_TO.dtype)
        experts_N = experts_TK[rows, slots]
        if not torch.is_grad_enabled() and any(tensor.dtype != x_TD.dtype for tensor in tensors.values()):
            # Few tokens use few copies, and the others need not be cast.
            used, experts_N = experts_N.unique(return_inverse=True)
            tensors = {name: tensor[used] for name, tensor in tensors.items()}
        added = compute(tensors, x_TD[rows], experts_N[:, None], weights_TK[rows, slots][:, None])
        return base_out_TO.index_add(0, rows, added.to(base_out_TO.dtype))

    @torch.no_grad()
    def delta_products(self, tensors: Mapping[str, torch.Tensor], ids: Sequence[int]) -> torch.Tensor:
        """Inner products of what the copies have changed by, added up over the tensors.

        Args:
            tensors: Name -> (E, ...) tensor of the backbone, of which they are copies.
            ids: The experts that were copied, n of them.

        Returns:
            (n, n) float64, see `Experts.delta_products`.
        """
        total = torch.zeros(self.num_experts, self.num_experts, dtype=torch.float64)
        for name, parameter in self.named_parameters():
            changed = (parameter.float() - tensors[name][list(ids)].to(parameter.device).float()).flatten(1)
            total += (changed @ changed.T).double().cpu()
        return total

    def extra_repr(self) -> str:
        """Say how many experts were copied, as the parameters themselves are not listed."""
        return f"num_experts={self.num_experts}"
