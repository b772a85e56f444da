"""A table of ids learns what a matrix decides, and decides then: both stages, the learning, the change of stages."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from moe_peft import RoutedConfig, routed_layers
from moe_peft.integrations.values import parts_with, with_value
from moe_peft.losses.router_distillation import RouterDistillation
from moe_peft.routers import LinearRouter, TopK
from moe_peft.routers.sigmoid import Sigmoid
from moe_peft.routers.token_hash import hash_of
from moe_peft.routers.token_student import TokenStudent
from moe_peft.types import TokenContext
from tests.compare import assert_same
from tests.tiny import tiny_llama

from .made import D, E, T

IDS = torch.arange(T) % 6
KNOWN = TokenContext(token_ids=IDS)


def made(stage: int, **settings):
    torch.manual_seed(0)
    router = TokenStudent(D, E, select=TopK(top_k=1), gate=Sigmoid(), stage=stage, buckets=5, **settings).double()
    torch.nn.init.normal_(router.table)
    return router, torch.randn(T, D, dtype=torch.float64, requires_grad=True)


def test_the_first_stage_is_the_linear_router_and_the_table_is_its_student():
    router, x = made(1)
    plain = LinearRouter(D, E, select=TopK(top_k=1), gate=Sigmoid()).double()
    plain.load_state_dict({"weight": router.weight})
    found, expected = router(x, KNOWN), plain(x, KNOWN)
    assert torch.equal(found.weights, expected.weights) and torch.equal(found.experts, expected.experts)
    student = torch.stack([router.table[hash_of(IDS[t : t + 1], 0, 5)[0]].softmax(-1) for t in range(T)])
    assert_same(found.extras["student_probs"], student, [router.table], [router.table])
    assert torch.equal(found.extras["teacher_probs"].argmax(-1), expected.experts[:, 0])
    assert (found.extras["teacher_probs"].sum(-1) == 1).all()


def test_in_the_second_stage_the_table_chooses_and_the_matrix_weighs():
    router, x = made(2)
    found, weights = router(x, KNOWN), []
    for t in range(T):
        e = int(router.table[hash_of(IDS[t : t + 1], 0, 5)[0]].argmax())
        assert found.experts[t, 0] == e
        weights.append((router.weight[e] * x[t]).sum().sigmoid())
    assert_same(found.weights[:, 0], torch.stack(weights), [x, router.weight], [x, router.weight], 1e-10)
    loss = RouterDistillation()(found)
    loss.backward()
    assert loss == 0 and not router.table.grad.any()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_table_learns_what_the_matrix_decides_about_tokens_of_an_id(seed):
    router, _ = made(1)
    generator = torch.Generator().manual_seed(seed)
    words, optimizer = torch.randn(5, D, generator=generator).double(), torch.optim.Adam([router.table], lr=0.1)
    ids = torch.arange(5)
    ids = ids[hash_of(ids, 0, 5).unique(return_inverse=True)[1].argsort()]
    known = TokenContext(token_ids=ids)
    for _ in range(150):
        optimizer.zero_grad()
        RouterDistillation()(router(words[ids], known)).backward()
        optimizer.step()
    decided = router(words[ids], known).experts[:, 0]
    alone = [(hash_of(ids, 0, 5) == bucket).sum() == 1 for bucket in hash_of(ids, 0, 5)]
    router.stage = 2
    found = router(words[ids], known).experts[:, 0]
    assert any(alone) and all(a == b for a, b, own in zip(found, decided, alone, strict=True) if own)


def test_the_stage_is_a_number_that_a_schedule_may_change():
    config = RoutedConfig(scorer="token_student", gate="sigmoid", top_k=1, router_args={"buckets": 8})
    model = get_peft_model(tiny_llama(), config)
    assert {id(part) for part in parts_with(model, "stage")} == {
        id(layer.router["default"]) for layer in routed_layers(model)
    }
    assert with_value(config, "stage", 2).router_args["stage"] == 2
    with pytest.raises(ValueError, match="stage=3 must be 1 or 2"):
        with_value(config, "stage", 3)
    with pytest.raises(ValueError, match="tokens' ids"):
        made(1)[0](torch.randn(2, D).double(), TokenContext())
