"""Grouped products equal a product for each group, forward and gradient, whatever the operands' dtype and strides."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from moe_peft.ops import grouped
from moe_peft.ops.grouped import grouped_mm, padded_rank
from tests.compare import assert_same

ENDS = [3, 3, 12, 13]  # an empty group, and groups of odd sizes


def by_group(x, matrices, ends):
    starts = [0, *ends[:-1]]
    return torch.cat([x[s:e] @ m for s, e, m in zip(starts, ends, matrices, strict=True)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("width", "out"), [(8, 16), (16, 8), (5, 7), (8, 3)])
@pytest.mark.parametrize("layout", ["plain", "transposed", "permuted"])
def test_equals_a_product_for_each_group(dtype, width, out, layout):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ENDS[-1], width, generator=generator, dtype=dtype).requires_grad_()
    order = {"plain": (0, 1, 2), "transposed": (0, 2, 1), "permuted": (2, 1, 0)}[layout]
    shape = [0, 0, 0]
    for place, size in zip(order, (len(ENDS), width, out), strict=True):
        shape[place] = size
    leaf = torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()
    matrices = leaf.permute(*order)
    ends = torch.tensor(ENDS, dtype=torch.int32)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert_same(grouped_mm(x, matrices, ends), by_group(x, matrices, ENDS), [x, leaf], [x, leaf], tolerance)


@pytest.mark.parametrize(
    ("dtype", "width", "taken"),
    [
        (torch.float32, 8, True),
        (torch.float32, 6, False),
        (torch.bfloat16, 8, True),
        (torch.bfloat16, 12, False),
        (torch.float16, 16, True),
        (torch.float64, 8, False),
    ],
)
def test_torch_computes_what_it_takes_and_a_loop_the_rest(dtype, width, taken, monkeypatch):
    calls = []

    def spy(*args, **kwargs):
        calls.append(args)
        return F.grouped_mm(*args, **kwargs)

    monkeypatch.setattr(grouped, "F", type("Spy", (), {"grouped_mm": staticmethod(spy)}))
    x, matrices = torch.randn(13, width, dtype=dtype), torch.randn(4, width, 8, dtype=dtype)
    grouped_mm(x, matrices, torch.tensor(ENDS, dtype=torch.int32))
    assert bool(calls) is taken


@pytest.mark.parametrize(
    ("dtype", "r", "padded"), [(torch.float32, 3, 4), (torch.bfloat16, 3, 8), (torch.bfloat16, 8, 8)]
)
def test_padded_pairs_have_the_same_product(dtype, r, padded):
    A, B = torch.randn(4, r, 6, dtype=dtype), torch.randn(4, r, 5, dtype=dtype)
    wide_A, wide_B = padded_rank(A, B)
    assert wide_A.shape == (4, padded, 6) and wide_B.shape == (4, padded, 5)
    assert torch.equal(wide_A.transpose(1, 2) @ wide_B, A.transpose(1, 2) @ B)


def test_the_loop_computes_gradients_of_trained_operands_alone():
    x, matrices = torch.randn(13, 5, dtype=torch.float64).requires_grad_(), torch.randn(4, 5, 7, dtype=torch.float64)
    out = grouped_mm(x, matrices, torch.tensor(ENDS, dtype=torch.int32))
    assert [tensor is None for tensor in out.grad_fn.saved_tensors] == [True, False, False]


def test_no_rows_make_no_rows():
    ends = torch.zeros(4, dtype=torch.int32)
    for width in (8, 5):
        leaf = torch.randn(4, width, 8).requires_grad_()
        out = grouped_mm(torch.randn(0, width), leaf, ends)
        assert out.shape == (0, 8)
        out.backward(torch.ones_like(out))
        assert not leaf.grad.any()
