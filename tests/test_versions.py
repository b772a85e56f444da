"""What README says of transformers' own adapter calls, on whichever releases are installed."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model

from moe_peft import RoutedConfig
from tests.tiny import padded_batch, tiny_llama
from tests.versions import NOT_COMPATIBLE, REFUSED, TRANSFORMERS_ASKS_FOR_MORE

CALLS = {
    "add_adapter": lambda model: model.add_adapter(RoutedConfig(num_experts=3), adapter_name="second"),
    "set_adapter": lambda model: model.set_adapter("default"),
    "active_adapters": lambda model: model.active_adapters(),
    "enable_adapters": lambda model: model.enable_adapters(),
    "disable_adapters": lambda model: model.disable_adapters(),
    "delete_adapter": lambda model: model.delete_adapter("default"),
    "get_adapter_state_dict": lambda model: model.get_adapter_state_dict(),
}


@pytest.fixture
def folder(tmp_path):
    get_peft_model(tiny_llama(), RoutedConfig(num_experts=3, init_weights=False)).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", REFUSED)
def test_the_calls_work_or_are_refused_with_the_release_that_they_ask_for(name, folder):
    model = tiny_llama()
    model.load_adapter(str(folder))
    if TRANSFORMERS_ASKS_FOR_MORE is None:
        CALLS[name](model)
    else:
        with pytest.raises(ValueError, match=NOT_COMPATIBLE):
            CALLS[name](model)


def test_loading_works_with_every_release(folder):
    loaded = PeftModel.from_pretrained(tiny_llama(), folder).eval()
    model, batch = tiny_llama().eval(), padded_batch([6, 3])
    model.load_adapter(str(folder))
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, loaded(**batch).logits)
