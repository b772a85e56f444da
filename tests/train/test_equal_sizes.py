"""The size of a method nearest to a number of parameters is found, without a change of its scale."""

from __future__ import annotations

import pytest
import torch
from common import moe_config
from equal_sizes import changed_flags, equal_size
from flags import MoeArguments

from moe_peft import describe
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def model():
    with torch.device("meta"):
        return tiny_llama()


def count(model, **flags):
    return equal_size(model, MoeArguments(**flags), "CAUSAL_LM", None).parameters


@pytest.mark.parametrize("wanted", [1, 3000, 12_345, 100_000])
@pytest.mark.parametrize(
    "flags",
    [
        {"moe_method": "lora"},
        {"moe_method": "routed", "moe_num_experts": 3},
        {"moe_method": "molora", "moe_r": 7},
        {"moe_method": "mov", "moe_num_experts": 4},
    ],
    ids=lambda flags: flags["moe_method"],
)
def test_no_neighbouring_size_is_nearer(flags, wanted, model):
    args = MoeArguments(**flags)
    size = equal_size(model, args, "CAUSAL_LM", wanted)
    ((flag, value),) = size.changed.items()
    for other in (value - 1, value + 1):
        if other >= 1:
            theirs = equal_size(model, changed_flags(args, {flag: other}), "CAUSAL_LM", None).parameters
            assert abs(theirs - wanted) >= abs(size.parameters - wanted)
    assert size.words == [f"--{flag}", str(value)] and f"of {wanted:,}, the nearest" in str(size)


def test_the_own_size_needs_no_change_and_methods_without_a_size_keep_theirs(model):
    own = count(model, moe_method="sira")
    size = equal_size(model, MoeArguments(moe_method="sira"), "CAUSAL_LM", own)
    assert not size.changed and str(size) == f"{own:,} trained parameters"
    whole = equal_size(model, MoeArguments(moe_method="none"), "CAUSAL_LM", own)
    assert not whole.changed and whole.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("rslora", [False, True])
def test_another_rank_keeps_the_scale_that_was_given(rslora, model):
    args = MoeArguments(moe_method="routed", moe_r=4, moe_lora_alpha=12.0, moe_use_rslora=rslora)
    size = equal_size(model, args, "CAUSAL_LM", 5 * count(model, moe_method="routed"))
    changed = moe_config(changed_flags(args, size.changed))
    assert changed.r > 4 and changed.scaling == pytest.approx(moe_config(args).scaling, rel=1e-5)
    assert describe(model, changed).num_parameters == size.parameters


def test_experts_are_no_fewer_than_a_token_uses(model):
    args = MoeArguments(moe_method="mov", moe_num_experts=4, moe_top_k=3, moe_router="top_k")
    assert equal_size(model, args, "CAUSAL_LM", 1).changed == {"moe_num_experts": 3}
