"""The dtype of the adapter's GEMMs follows the input, or autocast."""

from __future__ import annotations

import torch

from moe_peft.ops import cast_to_compute_dtype


def test_input_keeps_its_dtype_without_autocast():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.ones(2, 3, dtype=dtype)
        assert cast_to_compute_dtype(x) is x


def test_autocast_gives_its_dtype_but_never_to_float64():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cast_to_compute_dtype(torch.ones(2, 3)).dtype == torch.bfloat16
        assert cast_to_compute_dtype(torch.ones(2, 3, dtype=torch.float64)).dtype == torch.float64
