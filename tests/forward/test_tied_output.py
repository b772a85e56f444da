"""Losses that a stack's output carries: any form of output, the weight that holds in the backward pass."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from moe_peft.forward.joined_losses import LayerLosses, finish
from moe_peft.forward.measurement import Measurement, measure, own_graph, spread, tensors_of
from moe_peft.forward.tied_output import InjectKnown, differentiable, rebuilt, tie, tie_graph
from moe_peft.losses import LOSSES
from moe_peft.types import LossScale, TokenContext
from tests.compare import random_routing

Pair = namedtuple("Pair", "first second")


def decided(seed=0):
    """Two calls on leaves, and the gradient of their losses in the leaves."""
    torch.manual_seed(seed)
    context, calls, leaves, expected = TokenContext(training=True), [], [], []
    for number in range(2):
        logits = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
        probs = logits.softmax(-1)
        routing = type(random_routing(7, 4))(weights=probs, experts=None, logits=logits, probs=probs, context=context)
        losses = {"importance": LOSSES["importance"](), "z_loss": LOSSES["z_loss"]()}
        coefficients = {"importance": 0.5 + number, "z_loss": 0.25}
        calls.append(Measurement(LayerLosses(losses, coefficients, "global_batch"), routing, tied=True))
        leaves.append(logits)
        total = sum(coefficients[name] * loss(routing) for name, loss in losses.items())
        expected += torch.autograd.grad(total, logits, retain_graph=True)
    return calls, leaves, expected


def join(calls):
    finish({("place", "default", n): call.losses for n, call in enumerate(calls)}, None)


@pytest.mark.parametrize("value", [1.0, 0.25])
def test_a_graph_of_losses_gives_them_their_weight_and_leaves_the_gradient_of_the_output(value):
    calls, leaves, expected = decided()
    hidden = torch.ones(3, dtype=torch.float64, requires_grad=True)
    output = tie_graph(calls, LossScale(value), lambda: join(calls), BaseModelOutput(last_hidden_state=2 * hidden))
    output.last_hidden_state.sum().backward()
    assert torch.equal(hidden.grad, torch.full_like(hidden, 2))
    for leaf, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, value * gradient)


def test_known_gradients_take_the_weight_that_holds_in_the_backward_pass():
    calls, leaves, expected = decided()
    own, scale = [tensors_of(call.routing) for call in calls], LossScale(3.0)
    with own_graph():
        stacks = measure(calls)
        join(calls)
        spread(stacks)
    hidden = torch.ones(3, dtype=torch.float64, requires_grad=True)
    output = tie(calls, own, scale, (2 * hidden, 3 * hidden))
    scale.value = 0.5
    output[1].sum().backward()
    assert torch.equal(hidden.grad, torch.full_like(hidden, 3))
    for leaf, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, 0.5 * gradient)


def test_a_decision_that_is_made_again_gets_gradients_that_are_known():
    weights, logits = (torch.ones(2, 2, requires_grad=True) for _ in range(2))
    gradients = torch.full((2, 2), 2.0), torch.full((2, 2), 3.0)
    (5 * InjectKnown.apply(weights, weights, logits, *gradients)).sum().backward()
    assert torch.equal(weights.grad, torch.full((2, 2), 7.0)) and torch.equal(logits.grad, gradients[1])


def test_outputs_of_any_form_keep_it_and_what_has_no_gradient():
    x, fixed = torch.ones(2, requires_grad=True), torch.zeros(2)
    outputs = [x, (x, fixed, None), [x], {"a": x, "b": fixed}, Pair(x, fixed), BaseModelOutput(last_hidden_state=x)]
    for output in outputs:
        count = len(list(differentiable(output)))
        new = [torch.full((2,), 5.0) for _ in range(count)]
        made = rebuilt(output, iter(new))
        assert type(made) is type(output) and count == 1
        first = (
            made if isinstance(made, torch.Tensor) else next(iter(made.values() if hasattr(made, "values") else made))
        )
        assert first is new[0]
    assert outputs[-1].last_hidden_state is not x
    assert list(differentiable((fixed, None, "text"))) == []


def test_without_a_gradient_in_the_output_or_the_decisions_the_output_stays():
    calls, _, _ = decided()
    output = (torch.zeros(2),)
    assert tie_graph(calls, LossScale(), lambda: join(calls), output) is output
    assert tie([], [], LossScale(), output) is output
