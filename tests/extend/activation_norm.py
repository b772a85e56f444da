"""A router without parameters: an expert's score is the norm of what its down matrix makes of the input.

z_e = |A_e x|
"""

from __future__ import annotations

import torch

from moe_peft.extend import Router


class ActivationNorm(Router):
    reads = "activations"
    needs = frozenset({"activations"})

    def scores(self, x, context):
        return torch.linalg.vector_norm(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
