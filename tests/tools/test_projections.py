"""An expert's fused matrix and its projections are the same numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from moe_peft.tools.projections import joined, projections_of


@pytest.mark.parametrize("flags", [{}, {"is_concatenated": False}, {"has_gate": False}])
@pytest.mark.parametrize("matrix", ["gate_up", "down"])
def test_projections_join_to_what_they_were_taken_from(flags, matrix):
    rows, experts = torch.randn(8, 3), SimpleNamespace(**flags)
    parts = dict(projections_of(experts, matrix, rows, ("w1", "w3", "w2")))
    assert torch.equal(joined(experts, matrix, parts, ("w1", "w3", "w2")), rows)
    expected = {"down": ["w2"], "gate_up": ["w1", "w3"] if flags.get("has_gate", True) else ["w3"]}
    assert list(parts) == expected[matrix]
