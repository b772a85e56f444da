"""Three values for many: which are kept, at which scale, and every bit of them again."""

from __future__ import annotations

import math

import pytest
import torch

from moe_peft.tools.ternary import Ternary, packed, ternary, unpacked


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 4), (16,)])
@pytest.mark.parametrize("density", [0.01, 0.2, 1.0])
def test_the_largest_are_kept_at_the_scale_of_the_formula_and_packed_without_loss(shape, density):
    change = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = ternary(change, density, alpha=2.0)
    kept = found.signs != 0
    assert int(kept.sum()) == max(1, math.ceil(density * change.numel()))
    assert change[kept].abs().min() >= change[~kept].abs().max() if bool((~kept).any()) else True
    assert torch.equal(found.signs[kept], change[kept].sign().to(torch.int8))
    assert found.scale == pytest.approx(2 * float(change.std(unbiased=False)), rel=1e-6)
    again = unpacked(packed(found), change.shape)
    assert torch.equal(again.signs, found.signs) and again.scale == found.scale
    assert torch.equal(again.dense(), found.dense())


def test_no_scale_has_a_smaller_error_than_the_one_that_is_asked_for():
    change = torch.randn(50, generator=torch.Generator().manual_seed(1))
    errors = {
        alpha: float((change - ternary(change, 0.3, alpha).dense()).norm()) for alpha in (None, 0.5, 1.0, 1.5, 2.0)
    }
    assert errors[None] == min(errors.values())


def test_zeros_are_never_kept():
    found = ternary(torch.tensor([0.0, -3.0, 0.0, 0.0]), 1.0, None)
    assert found.signs.tolist() == [0, -1, 0, 0] and found.scale == 3


@pytest.mark.parametrize(
    "change",
    [
        {"mask": torch.zeros(3, dtype=torch.uint8)},
        {"mask": torch.full((2,), 255, dtype=torch.uint8)},
        {"sign": torch.zeros(2, dtype=torch.uint8)},
        {"scale": torch.tensor([math.nan])},
        {"mask": torch.zeros(2)},
    ],
)
def test_bits_of_another_tensor_are_refused(change):
    parts = packed(Ternary(torch.tensor([1, -1, 0, 0, 0, 0, 0, 0, 1], dtype=torch.int8), 1.0))
    with pytest.raises(ValueError, match=r"mask|signs|scale"):
        unpacked({**parts, **change}, torch.Size([9]))
