"""A mixture of routers: the formula, and one router alone is the linear scorer."""

from __future__ import annotations

import torch

from moe_peft.routers import Dense, LinearRouter
from moe_peft.routers.mixture import MixtureRouter
from moe_peft.types import TokenContext
from tests.compare import assert_same

from .made import D, E, T, rows


def made(num_routers):
    torch.manual_seed(0)
    router = MixtureRouter(D, E, select=Dense(), num_routers=num_routers, init_std=0.7).double()
    return router, torch.randn(T, D, dtype=torch.float64, requires_grad=True)


def test_equals_the_formula():
    router, x = made(3)
    z = []
    for t in range(T):
        mixing = torch.stack([(v * x[t]).sum() for v in router.mixing]).softmax(-1)
        z.append([sum(mixing[m] * (router.weight[m, e] * x[t]).sum() for m in range(3)) for e in range(E)])
    leaves = [x, *router.parameters()]
    assert_same(router(x, TokenContext()).logits, rows(z), leaves, leaves)


def test_one_router_is_the_linear_scorer():
    router, x = made(1)
    plain = LinearRouter(D, E, select=Dense()).double()
    plain.weight.data = router.weight.data[0].clone()
    torch.testing.assert_close(router(x, TokenContext()).weights, plain(x, TokenContext()).weights)
