"""What a `Routing` says about its weights and requests."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moe_peft.types import Routing, TokenContext
from tests.compare import random_routing


def sparse(weights, experts, num_experts, valid=None):
    weights, experts = torch.tensor(weights), torch.tensor(experts)
    probs = torch.zeros(weights.shape[0], num_experts)
    return Routing(weights, experts, probs, probs, context=TokenContext(valid=valid))


def test_gate_matrix_puts_each_weight_in_its_experts_column():
    routing = sparse([[0.5, 0.2], [0.7, 0.1]], [[2, 0], [1, 2]], 3)
    assert torch.equal(routing.gate_matrix(), torch.tensor([[0.2, 0.0, 0.5], [0.0, 0.7, 0.1]]))


def test_gate_matrix_ignores_slots_without_an_expert():
    routing = sparse([[0.5, 9.0], [9.0, 9.0]], [[2, 3], [3, 3]], 3)
    assert torch.equal(routing.gate_matrix(), torch.tensor([[0.0, 0.0, 0.5], [0.0, 0.0, 0.0]]))


def test_gate_matrix_adds_the_weights_of_two_slots_with_the_same_expert():
    assert torch.equal(sparse([[0.5, 0.25]], [[1, 1]], 3).gate_matrix(), torch.tensor([[0.0, 0.75, 0.0]]))


def test_gate_matrix_of_a_dense_decision_is_its_weights():
    routing = random_routing(5, 3)
    assert routing.gate_matrix() is routing.weights


def test_gradient_of_the_gate_matrix_reaches_the_weight_of_its_slot():
    routing = random_routing(5, 4, 2)
    weights = routing.weights.detach().requires_grad_()
    factors = torch.randn(5, 4, dtype=torch.float64)
    gates = Routing(weights, routing.experts, routing.logits, routing.probs).gate_matrix()
    (grad,) = torch.autograd.grad((gates * factors).sum(), [weights])
    assert torch.equal(grad, factors.gather(1, routing.experts))


def test_requests_are_ones_where_an_expert_was_asked_and_zero_at_padding():
    valid = torch.tensor([True, False, True])
    routing = sparse([[0.5, 0.0]] * 3, [[2, 0], [1, 2], [0, 3]], 3, valid)
    assert torch.equal(routing.request_matrix(), torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 0, 0]]))


def test_requests_of_a_dense_decision_are_all_experts_of_valid_tokens():
    valid = torch.tensor([True, False])
    requests = random_routing(2, 3, context=TokenContext(valid=valid)).request_matrix()
    assert torch.equal(requests, torch.tensor([[1.0] * 3, [0.0] * 3], dtype=torch.float64))


@pytest.mark.parametrize("top_k", [None, 1, 3])
def test_number_of_experts_and_mask_are_read_off(top_k):
    valid = torch.tensor([True, False])
    routing = random_routing(2, 3, top_k, context=TokenContext(valid=valid))
    assert routing.num_experts == 3 and routing.valid is valid


def test_decisions_and_contexts_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        random_routing(2, 3).weights = None
    with pytest.raises(dataclasses.FrozenInstanceError):
        TokenContext().training = True


def test_default_context_is_inference_over_one_sequence_without_padding():
    context = TokenContext()
    assert not context.training and context.valid is None and context.loss_scale is None
    assert context.sequences is None and context.num_sequences == 1


def test_a_decision_with_other_weights_is_the_same_in_all_else():
    routing = random_routing(5, 4, 2)
    weights = torch.rand(5, 2)
    expected = dataclasses.replace(routing, weights=weights)
    found = routing.with_weights(weights)
    assert found.weights is weights and routing.weights is not weights
    assert all(getattr(found, own.name) is getattr(expected, own.name) for own in dataclasses.fields(routing))
