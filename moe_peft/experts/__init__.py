"""Experts by name: banks of parameters of which a token uses some."""

from __future__ import annotations

from torch import nn

from .low_rank import LowRankExperts

EXPERTS: dict[str, type[nn.Module]] = {"low_rank": LowRankExperts}

__all__ = ["EXPERTS", "LowRankExperts"]
