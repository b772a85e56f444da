"""What a merge makes of each parameter is what merging makes of it."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from moe_peft import EsftConfig, ExpertLoraConfig, MoloraConfig, MovConfig
from moe_peft.tools.weight_changes import weight_changes
from tests.contract.cases import randomize, tiny_olmoe
from tests.tiny import tiny_llama

CASES = {
    "linear": (tiny_llama, MoloraConfig(num_experts=1)),
    "scaled": (lambda: tiny_llama(attention_bias=True), MovConfig(num_experts=1)),
    "slices": (tiny_olmoe, EsftConfig(experts={"0": [2], "1": [0, 3]})),
    "pairs": (tiny_olmoe, ExpertLoraConfig(r=2, target_matrices=["down"])),
}


@pytest.mark.parametrize("case", CASES)
def test_each_change_gives_the_merged_parameter_and_changes_nothing_itself(case):
    build, config = CASES[case]
    before = {name: own.detach().clone() for name, own in build().named_parameters()}
    model = get_peft_model(build(), config)
    randomize(model)
    changes = weight_changes(model)
    changed = {name: change(before[name].clone()) for name, change in changes.items()}
    merged = dict(model.merge_and_unload().named_parameters())
    assert merged.keys() == before.keys()
    for name, own in merged.items():
        assert torch.equal(own, changed.get(name, before[name]))
    assert any(not torch.equal(changed[name], before[name]) for name in changed)


def test_an_adapter_of_pefts_own_beside_it_and_a_name_that_is_not_there_are_refused():
    model = get_peft_model(tiny_llama(), MoloraConfig(num_experts=1))
    with pytest.raises(ValueError, match="no adapter 'other'"):
        weight_changes(model, "other")
    stock = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="peft's own"):
        weight_changes(stock)
