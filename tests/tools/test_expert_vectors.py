"""Descriptions of experts are set at every place, saved with the adapter, and read as numbers of many forms."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model

from moe_peft import RoutedConfig, routed_layers
from moe_peft.tools import describe_experts
from moe_peft.tools.expert_vectors import as_numbers
from tests.tiny import tiny_llama


@pytest.mark.parametrize("form", [lambda own: own, lambda own: own.tolist(), lambda own: own.half().numpy()])
def test_descriptions_are_those_that_are_given_also_after_loading(form, tmp_path):
    vectors = torch.tensor([[0.5, -1.0], [2.0, 0.25], [1.0, 1.0]])
    fields = {"router_args": {"width": 2, "hidden": 3}, "num_experts": 3, "target_modules": ["up_proj"]}
    model = get_peft_model(tiny_llama(), RoutedConfig(scorer="domain_embedding", **fields))
    describe_experts(model, form(vectors))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    for layer in (*routed_layers(model), *routed_layers(again)):
        assert torch.equal(layer.router["default"].domains, vectors)


def test_what_is_no_number_is_refused_by_name():
    for wrong in ("text", None, [[1.0], [1.0, 2.0]], {"a": 1}):
        with pytest.raises(ValueError, match=r"vectors=.* must be a tensor or lists of numbers"):
            as_numbers(wrong, "vectors")
    with pytest.raises(ValueError, match="vectors: the numbers are not finite"):
        as_numbers([1.0, float("inf")], "vectors")
    with pytest.raises(TypeError, match="no PeftModel"):
        describe_experts(tiny_llama(), [[1.0]])
