"""A smooth gate that is never zero: p = log(1 + exp(z))."""

from __future__ import annotations

import torch

from moe_peft.extend import Gate


class Softplus(Gate):
    def __call__(self, logits_TE, context):
        return torch.nn.functional.softplus(logits_TE)
