"""A backbone's decision read as a `Routing`: weights as they are, slots without an expert, what telemetry sees."""

from __future__ import annotations

import pytest
import torch

from moe_peft.routers import backbone_routing
from moe_peft.types import TokenContext


def decision(num_tokens: int, dtype: torch.dtype = torch.float64):
    torch.manual_seed(num_tokens)
    index = torch.rand(num_tokens, 5).argsort(-1)[:, :3]
    return index, torch.rand(num_tokens, 3, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("num_tokens", [0, 1, 13])
def test_gates_are_the_weights_at_their_experts(num_tokens):
    index, weights = decision(num_tokens)
    routing = backbone_routing(index, weights, 5, TokenContext())
    expected = torch.zeros(num_tokens, 5, dtype=torch.float64)
    for t in range(num_tokens):
        for k in range(3):
            expected[t, index[t, k]] += weights[t, k].detach()
    torch.testing.assert_close(routing.gate_matrix().detach(), expected, rtol=0, atol=0)
    assert routing.num_experts == 5 and routing.experts.dtype == torch.int64


def test_gradient_reaches_the_backbone_s_weights():
    index, weights = decision(13)
    scale = torch.randn(13, 5, dtype=torch.float64)
    (backbone_routing(index, weights, 5, TokenContext()).gate_matrix() * scale).sum().backward()
    torch.testing.assert_close(weights.grad, scale.gather(1, index))


@pytest.mark.parametrize("sentinel", [5, 9])
def test_an_index_beyond_the_experts_is_a_slot_without_one(sentinel):
    index, weights = decision(13)
    index[4] = sentinel
    index[7, 2] = sentinel
    routing = backbone_routing(index, weights, 5, TokenContext())
    assert routing.experts[4].tolist() == [5, 5, 5] and routing.weights[4].eq(0).all()
    assert routing.gate_matrix()[4].eq(0).all() and routing.probs[4].eq(0).all()
    assert (routing.gate_matrix()[7] > 0).sum() == 2
    assert routing.request_matrix().sum() == 13 * 3 - 4
    assert routing.logits.isfinite().all()


def test_probabilities_sum_to_one_and_their_logits_give_them_back():
    index, weights = decision(13)
    routing = backbone_routing(index, 2.5 * weights, 5, TokenContext())
    torch.testing.assert_close(routing.probs.sum(-1), torch.ones(13, dtype=torch.float64))
    torch.testing.assert_close(routing.logits.softmax(-1), routing.probs)


@pytest.mark.parametrize(
    ("given", "kept"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2]
)
def test_decisions_are_kept_in_float32_or_wider(given, kept):
    index, weights = decision(13, given)
    routing = backbone_routing(index.int(), weights, 5, TokenContext())
    assert routing.weights.dtype == routing.probs.dtype == routing.logits.dtype == kept
