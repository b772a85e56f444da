"""What an experts module is called with is told by types, and whether it is called so by its signature."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_peft.backbone.experts_call import experts_call, takes_routing


def test_inputs_of_experts_are_told_apart_by_their_types():
    hidden, index, weights = torch.randn(3, 4), torch.zeros(3, 2, dtype=torch.long), torch.rand(3, 2)
    for args, kwargs in (
        ((hidden, index, weights), {}),
        ((hidden, weights, index), {}),
        ((hidden,), {"i": index, "w": weights}),
    ):
        call = experts_call(args, kwargs)
        assert call.hidden is hidden and call.index is index and call.weights is weights
    with pytest.raises(ValueError, match="router of its own"):
        experts_call((hidden,), {})
    with pytest.raises(ValueError, match="router of its own"):
        experts_call((hidden, index, weights[:, :1]), {})


def test_a_module_takes_a_routing_if_three_arguments_can_be_given_by_position():
    class Routed(nn.Module):
        def forward(self, hidden, index, weights):
            return hidden

    class Gated(nn.Module):
        def forward(self, hidden, gammas, *, index=None):
            return hidden

    assert takes_routing(Routed) and not takes_routing(Gated) and not takes_routing(nn.Linear)
