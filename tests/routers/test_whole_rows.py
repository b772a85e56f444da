"""Slices of rows are refused by name, with both ways out; whole rows pass."""

from __future__ import annotations

import pytest

from moe_peft.routers import GATES, SCORERS, SELECTORS
from moe_peft.routers.whole_rows import check_whole_rows
from moe_peft.types import TokenContext

from .made import E, linear


def test_a_slice_is_refused_with_what_to_set():
    check_whole_rows(TokenContext(), "x=1", "it counts rows", "x=None")
    with pytest.raises(ValueError, match=r"^x=1: .* slices of the rows, and it counts rows\. Set .*, or x=None\.$"):
        check_whole_rows(TokenContext(part=2), "x=1", "it counts rows", "x=None")


@pytest.mark.parametrize("name", [name for name, kind in SELECTORS.items() if "sequences" in kind.context_needs])
def test_a_selector_that_looks_at_other_tokens_in_evaluation_refuses_slices(name):
    kind = SELECTORS[name]
    if "sequences" not in kind.context_needs or not {"softmax"} & set(GATES) or not SCORERS:
        pytest.skip("decides about each token alone in evaluation")
    router, x = linear(kind())
    assert E > 1
    with pytest.raises(ValueError, match="slices of the rows"):
        router(x, TokenContext(part=4))
