"""Routing down a tree: chances of leaves by walking it, any number of leaves, and the entropy of its nodes."""

from __future__ import annotations

import pytest
import torch

from moe_peft.losses.entropy import entropy
from moe_peft.routers import Dense
from moe_peft.routers.tree import Tree, paths
from moe_peft.types import TokenContext
from tests.compare import assert_same

from .made import D, T


def made(num_experts):
    torch.manual_seed(0)
    router = Tree(D, num_experts, select=Dense()).double()
    router.offset.data.normal_()
    return router, torch.randn(T, D, dtype=torch.float64, requires_grad=True)


def walk(router, x, node, chance, found, reached):
    """Chances of the leaves below a node, of which each node halves some."""
    nodes = router.num_experts - 1
    if node >= nodes:
        found[node - nodes] = chance
        return
    reached.append(chance)
    left = (router.weight[node] @ x + router.offset[node]).sigmoid()
    walk(router, x, 2 * node + 1, chance * left, found, reached)
    walk(router, x, 2 * node + 2, chance * (1 - left), found, reached)


@pytest.mark.parametrize("num_experts", [2, 3, 4, 7, 8])
def test_equals_the_walk_down_the_tree(num_experts):
    router, x = made(num_experts)
    rows = []
    for t in range(T):
        found = {}
        walk(router, x[t], 0, torch.ones(()).double(), found, [])
        rows.append(torch.stack([found[e] for e in range(num_experts)]))
    leaves = [x, *router.parameters()]
    routing = router(x, TokenContext())
    assert_same(routing.weights, torch.stack(rows), leaves, leaves, 1e-10)
    torch.testing.assert_close(routing.logits.exp(), routing.probs)


def test_the_entropy_of_the_leaves_is_that_of_the_nodes_by_who_comes_there():
    router, x = made(4)
    probs = router(x, TokenContext()).probs
    expected = []
    for t in range(T):
        reached = []
        walk(router, x[t], 0, torch.ones(()).double(), {}, reached)
        left = (router.weight @ x[t] + router.offset).sigmoid()
        own = -(left * left.log() + (1 - left) * (1 - left).log())
        # Nodes in the order of the walk: the root, its left child, its right child.
        expected.append(sum(chance * own[node] for chance, node in zip(reached, (0, 1, 2), strict=True)))
    torch.testing.assert_close(entropy(probs, 1.0), torch.stack(expected))


@pytest.mark.parametrize("num_experts", [1, 2, 4, 8, 13])
def test_every_leaf_has_a_path_of_its_own_and_a_balanced_tree_equal_ones(num_experts):
    found = paths(num_experts)
    assert len({tuple(row) for row in found}) == num_experts
    lengths = {sum(row) for row in found}
    assert max(lengths) - min(lengths) <= 1 and (num_experts & (num_experts - 1) or len(lengths) == 1)
