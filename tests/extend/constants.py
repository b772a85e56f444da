"""Experts that say the same to every token: y = base + sum_e g_e v_e (the constant experts of MoE++, 2410.07348)."""

from __future__ import annotations

import torch
from torch import nn

from moe_peft.extend import Experts


class Constants(Experts):
    fields = ("init_weights",)
    up = ("v",)

    def __init__(self, in_features, out_features, *, num_experts, r, init_weights=True):
        super().__init__()
        self.num_choices = num_experts
        self.v = nn.Parameter(torch.zeros(num_experts, out_features))
        if init_weights is False:
            nn.init.normal_(self.v)

    @classmethod
    def shapes(cls, num_experts, r):
        return {"v": (num_experts,)}

    def prepare(self, x_TD, context):
        return x_TD

    def combine(self, h, base_out_TO, routing, *, in_place=False):
        with torch.autocast(h.device.type, enabled=False):
            return base_out_TO + (routing.gate_matrix().to(h.dtype) @ self.v.to(h.dtype)).to(base_out_TO.dtype)
