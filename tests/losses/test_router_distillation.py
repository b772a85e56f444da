"""The squared distance of a student's probabilities from a teacher's, which moves the student alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_peft.losses.router_distillation import RouterDistillation
from moe_peft.types import TokenContext
from tests.compare import assert_same, random_routing


@pytest.mark.parametrize("num_tokens", [1, 13])
def test_equals_the_formula_and_moves_the_student_alone(num_tokens):
    valid = torch.arange(num_tokens) % 4 != 1
    routing = random_routing(num_tokens, 5, context=TokenContext(valid=valid))
    teacher = random_routing(num_tokens, 5, seed=1)
    routing = replace(routing, extras={"student_probs": routing.probs, "teacher_probs": teacher.probs})
    own = [
        sum((p - q.detach()) ** 2 for p, q in zip(*rows, strict=True))
        for *rows, counts in zip(routing.probs, teacher.probs, valid, strict=True)
        if counts
    ]
    leaves = [routing.logits, teacher.logits]
    assert_same(RouterDistillation()(routing), sum(own) / len(own), leaves, leaves)


def test_a_student_that_is_its_own_teacher_costs_nothing():
    routing = random_routing(7, 5)
    routing = replace(routing, extras={"student_probs": routing.probs, "teacher_probs": routing.probs.detach()})
    loss = RouterDistillation()(routing)
    loss.backward()
    assert loss == 0 and not routing.logits.grad.any()
