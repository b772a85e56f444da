"""Adapter names of rows: counted before anything runs, and repeated with the rows by generation."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import GenerationConfig

from moe_peft import RoutedConfig
from tests.contract.cases import randomize
from tests.tiny import padded_batch, tiny_llama, tiny_t5

NEW = {"max_new_tokens": 4, "min_new_tokens": 4}


def two_adapters(make, task_type):
    config = {"num_experts": 3, "r": 2, "task_type": task_type, "target_modules": "all-linear"}
    model = get_peft_model(make(), RoutedConfig(**config), adapter_name="a")
    model.add_adapter("b", RoutedConfig(**config))
    randomize(model)
    return model.eval()


@pytest.fixture(scope="module", params=["CAUSAL_LM", "SEQ_2_SEQ_LM", None])
def model(request):
    return two_adapters(tiny_t5 if request.param == "SEQ_2_SEQ_LM" else tiny_llama, request.param)


SEARCHES = {
    "beams": {"num_beams": 3},
    "returned beams": {"num_beams": 3, "num_return_sequences": 2},
    "greedy": {},
}


@pytest.mark.parametrize("from_config", [False, True])
@pytest.mark.parametrize("search", SEARCHES)
def test_rows_that_a_search_repeats_keep_their_adapters(model, search, from_config):
    batch, fields = padded_batch([5, 3], side="left"), SEARCHES[search]
    given = (
        {"generation_config": GenerationConfig(**NEW, **fields, pad_token_id=0)} if from_config else {**NEW, **fields}
    )
    found = model.generate(**batch, **given, adapter_names=["b", "a"])
    times = fields.get("num_return_sequences", 1)
    for row, name in enumerate(["b", "a"]):
        model.set_adapter(name)
        alone = model.generate(**{key: value[row : row + 1] for key, value in batch.items()}, **given)
        assert torch.equal(found[row * times : (row + 1) * times], alone)


def test_rows_that_sampling_repeats_keep_their_adapters(model):
    batch = padded_batch([5, 3], side="left")
    fields = {**NEW, "do_sample": True, "num_return_sequences": 2, "output_logits": True, "max_new_tokens": 1}
    fields["min_new_tokens"] = 1
    found = model.generate(**batch, **fields, return_dict_in_generate=True, adapter_names=["b", "a"]).logits[0]
    for row, name in enumerate(["b", "a"]):
        model.set_adapter(name)
        alone = model.generate(**batch, **fields, return_dict_in_generate=True).logits[0]
        torch.testing.assert_close(found[2 * row : 2 * row + 2], alone[2 * row : 2 * row + 2], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("names", [["a"], ["a", "b", "a"], ["a"] * 4, []])
@pytest.mark.parametrize("call", ["generate", "forward"])
def test_another_number_of_names_than_rows_is_refused(model, call, names):
    batch = padded_batch([5, 3], side="left")
    if hasattr(model.get_base_model(), "encoder"):
        batch["decoder_input_ids"] = batch["input_ids"]
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    model.get_base_model().generation_config.num_beams = 2
    try:
        with pytest.raises(ValueError, match="Length of `adapter_names` should be the same as the number of inputs"):
            (model.generate if call == "generate" else model)(**batch, adapter_names=names)
    finally:
        model.get_base_model().generation_config.num_beams = 1
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks
    with torch.no_grad():
        model(**batch)


@pytest.mark.parametrize("names", ["a", "ab", [1, 2], {"a": 1, "b": 2}])
def test_anything_but_a_list_of_names_is_refused_by_type(model, names):
    with pytest.raises(TypeError, match="must be a list of one adapter name per row"):
        model(**padded_batch([5, 3]), adapter_names=names)


def test_unknown_names_are_refused_and_cut(model):
    with pytest.raises(ValueError, match="non-existing adapter") as caught:
        model(**padded_batch([5, 3]), adapter_names=["a", "x" * 5000])
    assert len(str(caught.value)) < 500
