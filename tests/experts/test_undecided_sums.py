"""A kind of experts has a shorter way than a decision where it says so, and no other."""

from __future__ import annotations

import pytest
import torch

from moe_peft.experts import EXPERTS, Experts
from moe_peft.types import TokenContext


class Plain(Experts):
    """A kind from outside that says nothing of shorter ways."""


def test_a_kind_that_says_nothing_leaves_everything_to_a_decision():
    bank, x, known = Plain(), torch.randn(2, 5), TokenContext()
    assert bank.add_all(x, x, 0.5, known) is None and not bank.takes_gates(x, 2)
    with pytest.raises(NotImplementedError, match="Plain needs a decision"):
        bank.add_gated(x, x, torch.ones(2, 3), known)


@pytest.mark.parametrize("name", sorted(EXPERTS))
def test_who_takes_weights_alone_says_how(name):
    kind = EXPERTS[name]
    assert (kind.takes_gates is Experts.takes_gates) == (kind.add_gated is Experts.add_gated)
