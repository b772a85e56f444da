"""One where an index points and zero elsewhere, without a look at the indices, which would wait for their device."""

from __future__ import annotations

import torch


def one_hot(index: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Turn indices into rows of zeros with a one.

    `torch.nn.functional.one_hot` reads the smallest and the largest index on a processor.

    Args:
        index: (...) int64, each from 0 to size - 1.
        size: Number of columns.
        dtype: Of the result.

    Returns:
        (..., size) without graph.
    """
    zeros = torch.zeros(*index.shape, size, dtype=dtype, device=index.device)
    return zeros.scatter_(-1, index.unsqueeze(-1), 1)
