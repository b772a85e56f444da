"""What is not known is null, as JSON has no NaN, and large matrices are summed up."""

from __future__ import annotations

import math

import torch

from moe_peft.tools.report.numbers import of_cosines, rounded


def test_numbers_that_json_lacks_are_null():
    assert rounded({"a": [math.nan, math.inf, 0.12345678], "b": (1, "x", None, True)}) == {
        "a": [None, None, 0.123457],
        "b": [1, "x", None, True],
    }


def test_cosines_of_many_experts_are_summed_up():
    few = of_cosines(torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64))
    assert few == {"mean": 0.5, "largest": 0.5, "cosines": [[1.0, 0.5], [0.5, 1.0]]}
    assert "cosines" not in of_cosines(torch.eye(33))
    assert math.isnan(of_cosines(torch.full((2, 2), math.nan))["mean"])
