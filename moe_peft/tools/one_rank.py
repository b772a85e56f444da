"""Pairs of one rank, as serving engines read them.

An engine takes `r` and `lora_alpha` of an adapter_config.json for every pair of the file: vLLM reads no `rank_pattern`
and no `alpha_pattern`, SGLang no `use_rslora` either, and it refuses matrices of other ranks. Rows of A and columns of
B that are zero add nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional as F

Pairs = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


def of_one_rank(pairs: Pairs) -> tuple[int, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Fill pairs up with zeros to the largest rank among them.

    Args:
        pairs: Name -> A (R, D) and B (O, R).

    Returns:
        The rank, and the pairs of it by the same names.
    """
    rank = max(len(A_RD) for A_RD, _ in pairs.values())
    filled = {}
    for name, (A_RD, B_OR) in pairs.items():
        missing = rank - len(A_RD)
        filled[name] = F.pad(A_RD, (0, 0, 0, missing)), F.pad(B_OR, (0, missing))
    return rank, filled
