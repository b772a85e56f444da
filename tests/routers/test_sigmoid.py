"""The sigmoid gate: experts do not compete, and kept weights may be brought to a sum of one."""

from __future__ import annotations

import pytest
import torch

from moe_peft import MoePeftWarning, RoutedConfig
from moe_peft.routers import TopK
from moe_peft.routers.sigmoid import Sigmoid
from moe_peft.types import TokenContext
from tests.compare import assert_same

from .made import E, T, linear, rows


@pytest.mark.parametrize("normalise", [False, True])
def test_equals_the_formula(normalise):
    made, x = linear(TopK(top_k=2, norm_topk_prob=normalise), Sigmoid(), routed_scaling_factor=2.5)
    expected = []
    for t in range(T):
        p = [1 / (1 + torch.exp(-(made.weight[e] * x[t]).sum())) for e in range(E)]
        kept = sorted(range(E), key=lambda e: -p[e].item())[:2]
        total = sum(p[e] for e in kept) if normalise else 1.0
        expected.append([2.5 * p[e] / total if e in kept else torch.zeros(()).double() for e in range(E)])
    leaves = [x, made.weight]
    assert_same(made(x, TokenContext()).gate_matrix(), rows(expected), leaves, leaves)


def test_a_score_changes_its_own_expert_alone():
    logits = torch.randn(3, E, dtype=torch.float64)
    changed = logits.clone()
    changed[:, 1] += 1
    differs = Sigmoid()(logits, TokenContext()) != Sigmoid()(changed, TokenContext())
    assert differs.sum(0).tolist() == [0, 3, 0, 0]


def test_the_z_loss_has_no_meaning_beside_it_and_says_so():
    with pytest.warns(MoePeftWarning, match="'z_loss' keeps the softmax's normaliser small, and the gate 'sigmoid'"):
        RoutedConfig(gate="sigmoid", router_z_loss_coef=0.1)
    with pytest.warns(MoePeftWarning, match="'z_loss'"):
        RoutedConfig(gate="sigmoid", losses={"z_loss": 0.1})
    RoutedConfig(gate="sigmoid", losses={"importance": 0.1})
