"""Experts that share both matrices and differ by a diagonal between them: y = base + s B diag(sum_e g_e c_e) A x."""

from __future__ import annotations

import torch
from torch import nn

from moe_peft.extend import Experts, project


class CpDiagonal(Experts):
    fields = ("scaling", "init_weights")
    up = ("B",)
    mergeable = True

    def __init__(self, in_features, out_features, *, num_experts, r, scaling, init_weights=True):
        super().__init__()
        self.num_choices, self.scaling = num_experts, scaling
        self.A = nn.Parameter(torch.empty(r, in_features).uniform_(-1, 1) / in_features**0.5)
        self.c = nn.Parameter(1 + torch.randn(num_experts, r))
        self.B = nn.Parameter(torch.zeros(r, out_features))
        if init_weights is False:
            nn.init.normal_(self.B)

    @classmethod
    def shapes(cls, num_experts, r):
        return {"A": (r,), "c": (num_experts, r), "B": (r,)}

    def prepare(self, x_TD, context):
        return project(x_TD, self.A)

    def combine(self, h, base_out_TO, routing, *, in_place=False):
        mixed_Tr = routing.gate_matrix().to(h.dtype) @ self.c.to(h.dtype)
        with torch.autocast(h.device.type, enabled=False):
            return base_out_TO + (self.scaling * (h * mixed_Tr) @ self.B.to(h.dtype)).to(base_out_TO.dtype)

    def shared_rows(self, context):
        return self.A

    def delta_weight(self, weights_E):
        c_r = (weights_E.to(self.c)[:, None] * self.c).sum(0)
        return self.scaling * self.B.T @ (c_r[:, None] * self.A)
