"""The dtype of the adapter's GEMMs follows the input, or autocast; some weights are never rounded to 16 bit."""

from __future__ import annotations

import pytest
import torch

from moe_peft.ops import cast_to_compute_dtype, without_rounding


def test_input_keeps_its_dtype_without_autocast():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.ones(2, 3, dtype=dtype)
        assert cast_to_compute_dtype(x) is x


def test_autocast_gives_its_dtype_but_never_to_float64():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cast_to_compute_dtype(torch.ones(2, 3)).dtype == torch.bfloat16
        assert cast_to_compute_dtype(torch.ones(2, 3, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float32, torch.float8_e4m3fn, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
    ],
)
def test_weights_follow_to_float32_and_wider_and_never_to_sixteen_bits(before, after, expected):
    weight = torch.full((3,), 1.001, dtype=before)
    kept = without_rounding(weight, weight.to(after))
    assert kept.dtype == expected and torch.equal(kept, weight.to(expected))
