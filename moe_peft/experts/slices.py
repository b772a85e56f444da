"""Trainable copies of some of a backbone's experts, the whole matrices of each (ESFT, arXiv 2407.01906)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn


class ExpertSlices(nn.Module):
    """The selected slices of fused expert tensors, under the backbone's own names and in its own layout.

    Args:
        tensors: Name -> (E, ...) tensor of the backbone.
        ids: Selected experts, n of them, ascending.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], ids: Sequence[int]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            shape = (len(ids), *tensor.shape[1:])
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=tensor.dtype)))
        self.copy_from(tensors, ids)

    @torch.no_grad()
    def copy_from(self, tensors: Mapping[str, torch.Tensor], ids: Sequence[int]) -> None:
        """Take the values of the backbone's experts, unless either side holds none (meta device)."""
        for name, parameter in self.named_parameters():
            if not (parameter.is_meta or tensors[name].is_meta):
                parameter.copy_(tensors[name][list(ids)])
