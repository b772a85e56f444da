"""A kind that shares both matrices says what stands between them alone; its merged weight is its forward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_peft.experts.one_pair import OnePairExperts

E, R, IN, OUT = 3, 4, 6, 5
SIZES = {"num_experts": E, "r": R, "scaling": 0.5}


class Signs(OnePairExperts):
    """Diagonals that scale and turn signs."""

    def make_between(self, num_experts, r):
        self.d = nn.Parameter(torch.randn(num_experts, r))

    @classmethod
    def shapes(cls, num_experts, r):
        return {"A": (r,), "d": (num_experts, r), "B": (r,)}

    def delta_factors(self, weights_E):
        return (weights_E.to(self.d) @ self.d)[:, None] * self.A, self.scaling * self.B.T


def test_the_merged_weight_is_the_product_of_its_factors_and_nothing_at_the_start():
    bank, weights_E = Signs(IN, OUT, **SIZES, init_weights=False).double(), torch.rand(E).double()
    expected = sum(
        w * bank.scaling * bank.B.T @ torch.diag(d) @ bank.A for w, d in zip(weights_E, bank.d, strict=True)
    )
    torch.testing.assert_close(bank.delta_weight(weights_E), expected)
    assert not Signs(IN, OUT, **SIZES).delta_weight(torch.ones(E)).any()
    assert {name: tuple(own.shape[: len(Signs.shapes(E, R)[name])]) for name, own in bank.named_parameters()} == (
        Signs.shapes(E, R)
    )


def test_a_kind_that_does_not_say_what_stands_between_is_refused():
    with pytest.raises(NotImplementedError, match="OnePairExperts does not say what stands between"):
        OnePairExperts(IN, OUT, **SIZES)
