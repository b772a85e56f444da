"""The dtype of the adapter's GEMMs follows the input, or autocast; some weights are never rounded to 16 bit."""

from __future__ import annotations

import pytest
import torch

from moe_peft.ops import autocast_is_off, cast_to_compute_dtype, combine_experts, dtypes, without_rounding
from moe_peft.ops.choice import FEW_ROWS


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


@pytest.mark.parametrize("slow", [(), (torch.bfloat16, torch.float16)])
@pytest.mark.parametrize("num_tokens", [1, 13, FEW_ROWS + 1])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_16_bits_are_those_of_float32_to_rounding_where_their_products_are_slow(
    slow, num_tokens, in_place, dtype, monkeypatch
):
    monkeypatch.setattr(dtypes, "SLOW_ON_CPU", slow)
    torch.manual_seed(0)
    h, base, B, gates = (torch.randn(size) for size in ((num_tokens, 12), (num_tokens, 5), (4, 3, 5), (num_tokens, 4)))
    exact = [tensor.to(dtype).double().requires_grad_() for tensor in (h, base, B, gates)]
    own = [tensor.to(dtype).requires_grad_() for tensor in (h, base, B, gates)]
    assert dtypes.product_dtype(own[0]) == (torch.float32 if slow else dtype)
    results = []
    for h, base, B, gates in (exact, own):
        fresh = base * 1.0
        out = combine_experts(h, fresh, B, gates, scaling=0.5, in_place=in_place)
        assert out.dtype == base.dtype and (out.data_ptr() == fresh.data_ptr()) == in_place
        results.append((out, *torch.autograd.grad(out.sum(), (h, base, B, gates))))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(
            found.double(), expected, rtol=0.03, atol=0.05 * float(expected.detach().abs().max())
        )


def test_one_look_sees_autocast_of_any_device():
    assert autocast_is_off()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not autocast_is_off()
        with torch.autocast("cpu", enabled=False):
            assert autocast_is_off()
