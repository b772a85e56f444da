"""Fewer experts for a token while a context lasts: those of an adapter configured so, and all as before afterwards."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from moe_peft import RoutedConfig
from moe_peft.tools import slim
from tests.contract.cases import randomize
from tests.tiny import padded_batch, tiny_llama


def made(**fields):
    model = get_peft_model(
        tiny_llama(), RoutedConfig(**{"num_experts": 4, "r": 2, "top_k": 3, "lora_alpha": 8, **fields})
    ).eval()
    randomize(model)
    return model


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_it_computes_what_an_adapter_with_that_k_computes(top_k):
    model, other, batch = made(), made(top_k=top_k), padded_batch([6, 4])
    before = model(**batch).logits
    with slim(model, top_k=top_k):
        torch.testing.assert_close(model(**batch).logits, other(**batch).logits)
    assert torch.equal(model(**batch).logits, before)


def test_the_number_comes_back_after_an_exception_and_numbers_out_of_range_are_refused():
    model = made()
    with pytest.raises(KeyError), slim(model, top_k=1):
        raise KeyError
    with slim(model, top_k=3):
        pass
    for top_k in (0, 5, 1.0, True, None):
        with pytest.raises(ValueError, match="must be a whole number from 1 to 4"), slim(model, top_k=top_k):
            pass
    with (
        pytest.raises(ValueError, match="no router of the model has a top_k"),
        slim(made(router="dense", top_k=None), top_k=1),
    ):
        pass
