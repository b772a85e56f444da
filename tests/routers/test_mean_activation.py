"""Scores by the mean of an expert's activations: the formula, no parameter, and the down matrices that learn by it."""

from __future__ import annotations

import torch

from moe_peft.routers import TopK
from moe_peft.routers.mean_activation import MeanActivation
from moe_peft.types import TokenContext
from tests.compare import assert_same

from .made import E, T


def test_equals_the_formula_and_trains_what_it_reads():
    torch.manual_seed(0)
    A, x = (torch.randn(*shape).double().requires_grad_() for shape in ((E, 3, 5), (T, 5)))
    router = MeanActivation(5, E, select=TopK(top_k=2, norm_topk_prob=True))
    routing = router(torch.einsum("erd,td->ter", A, x), TokenContext())
    z = torch.stack([torch.stack([(A[e] @ x[t]).mean() for e in range(E)]) for t in range(T)])
    assert_same(routing.logits, z, [A, x], [A, x], 1e-10)
    assert not list(router.parameters()) and not router.learns
    torch.testing.assert_close(routing.weights, z.topk(2, -1).values.softmax(-1))
