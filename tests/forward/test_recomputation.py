"""What is recomputed: found by the checkpoint that asks for it and by the node that the engine is at."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moe_peft.forward.recomputation import NO_TASK, checkpoint_node, graph_task, next_node, owner_of_current_node


@dataclass
class Range:
    first_node: int
    last_node: int


def leaf():
    return torch.ones(2, requires_grad=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_is_seen_in_its_recomputation_alone(reentrant):
    seen = []

    def run(x):
        seen.append((graph_task() != NO_TASK, *checkpoint_node()))
        return x.sin()

    checkpoint(run, leaf(), use_reentrant=reentrant).sum().backward()
    (forward, first, node), (backward, second, other) = seen
    assert (forward, backward, second) == (False, True, True)
    assert first == reentrant and node is other and (node is not None) == reentrant
    assert checkpoint_node() == (False, None) and graph_task() == NO_TASK


def test_a_hook_of_a_backward_pass_repeats_nothing():
    seen = []

    def run(x):
        y = x.sin()
        y.register_hook(lambda grad: seen.append(checkpoint_node()))
        return y

    run(leaf()).sum().backward()
    assert seen == [(False, None)]


def test_a_backward_pass_inside_a_recomputation_starts_anew():
    seen = []

    def inner(x):
        y = x.cos()
        y.register_hook(lambda grad: seen.append((torch.is_grad_enabled(), checkpoint_node())))
        y.sum().backward()

    def run(x):
        inner(leaf())
        return x.sin()

    checkpoint(run, leaf(), use_reentrant=False).sum().backward()
    assert [found for _, found in seen] == [(False, None)] * 2


def test_the_innermost_pass_that_made_the_node_owns_it():
    found = []
    x = leaf()
    outer = Range(next_node(), 0)
    y = x.sin()
    inner = Range(next_node(), 0)
    z = y.cos()
    inner.last_node = next_node()
    w = z.exp()
    outer.last_node = next_node()
    same = Range(outer.first_node, inner.first_node)
    passes = [outer, inner, same]
    for tensor in (y, z, w):
        tensor.register_hook(lambda grad: found.append(owner_of_current_node(passes)))
    w.sum().backward()
    assert [one is other for one, other in zip(found, (outer, inner, same), strict=True)] == [True] * 3
    assert owner_of_current_node([]) is None and owner_of_current_node([outer]) is outer
    assert owner_of_current_node([outer, inner]) is inner
