"""A router without parameters: an expert's score is the mean of what the rows of its down matrix make of the input.

z_e = mean over r of (A_e x)_r            Avg-K, arXiv 2305.13999
"""

from __future__ import annotations

import torch

from moe_peft.extend import Router


class AvgK(Router):
    reads = "activations"
    needs = frozenset({"activations"})
    gives = frozenset()

    def scores(self, x, context):
        return x.to(torch.promote_types(x.dtype, torch.float32)).mean(-1)
