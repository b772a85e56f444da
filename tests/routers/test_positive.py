"""All that a gate leaves, which has to leave something out."""

from __future__ import annotations

import pytest
import torch

from moe_peft import RoutedConfig
from moe_peft.routers.positive import Positive
from moe_peft.types import TokenContext


def test_the_gate_is_the_weight():
    probs = torch.tensor([[0.0, 0.3, 2.0]])
    routing = Positive()(probs, probs, TokenContext(), 3)
    assert torch.equal(routing.gate_matrix(), probs) and routing.request_matrix().tolist() == [[0, 1, 1]]


def test_a_gate_that_leaves_nothing_out_is_refused():
    with pytest.raises(ValueError, match=r"router='positive' must be one that needs no selection, .*'relu'"):
        RoutedConfig(router="positive")
    assert RoutedConfig(router="positive", gate="relu").top_k is None
