"""A row has its one where the index points."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from moe_peft.ops import one_hot


@pytest.mark.parametrize("shape", [(), (1,), (0,), (13,), (3, 5)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.int64])
def test_equals_torchs_own(shape, dtype):
    index = torch.randint(0, 7, shape, generator=torch.Generator().manual_seed(0))
    found = one_hot(index, 7, dtype)
    assert found.dtype == dtype and torch.equal(found, F.one_hot(index, 7).to(dtype))


def test_an_index_beyond_the_columns_is_refused():
    with pytest.raises((IndexError, RuntimeError)):
        one_hot(torch.tensor([7]), 7, torch.float32)
