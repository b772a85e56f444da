"""Scores masked by ids: rare tokens keep to their expert, frequent ones see more, and the others score linearly."""

from __future__ import annotations

import pytest
import torch

from moe_peft.routers import TopK
from moe_peft.routers.threshold import Threshold
from moe_peft.routers.token_hash import hash_of
from moe_peft.routers.token_mask import TokenMask
from moe_peft.types import TokenContext
from tests.compare import assert_same

from .made import D, E, T

IDS = torch.tensor([3, 40, 4, 41, 5, 42, 3, 40, 6, 43, 7, 44, 45])


def made(select=None, **settings):
    torch.manual_seed(0)
    router = TokenMask(D, E, select=select or TopK(top_k=2), frequent_below=10, **settings).double()
    return router, torch.randn(T, D, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(("visible", "frequent"), [(1, None), (1, 3), (2, 4)])
def test_equals_a_softmax_over_the_experts_that_an_id_sees(visible, frequent):
    router, x = made(visible=visible, frequent_visible=frequent)
    rows = []
    for t, own in enumerate(IDS.tolist()):
        number = (frequent or E) if own < 10 else visible
        start = int(hash_of(IDS[t : t + 1], 0, E))
        seen = [(start + step) % E for step in range(number)]
        chances = (router.weight[seen] @ x[t]).softmax(-1)
        rows.append(torch.zeros(E).double().index_add(0, torch.tensor(seen), chances))
    found = router(x, TokenContext(token_ids=IDS)).probs
    assert_same(found, torch.stack(rows), [x, router.weight], [x, router.weight], 1e-10)


def test_a_rare_token_always_uses_its_one_expert():
    router, x = made()
    routing = router(x, TokenContext(token_ids=IDS))
    rare = IDS >= 10
    weights = routing.gate_matrix()[rare]
    assert ((weights == 0) | (weights == 1)).all() and (weights.sum(-1) == 1).all()
    assert torch.equal(weights.argmax(-1), hash_of(IDS[rare], 0, E))


def test_further_columns_of_a_selector_are_seen_by_all():
    router, x = made(Threshold())
    logits = router.scores(x, TokenContext(token_ids=IDS))
    assert logits.shape == (T, E + 1) and (logits[:, E] > -1e6).all()


def test_no_ids_are_refused():
    router, x = made()
    with pytest.raises(ValueError, match="TokenMask decides by the tokens' ids"):
        router(x, TokenContext())
