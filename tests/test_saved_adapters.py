"""Adapters saved by version 0.1.0 load bit for bit, give the logits they gave, and are saved under the same keys."""

from __future__ import annotations

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file

from tests.fixtures.adapters_0_1_0.make import ADAPTERS, FOLDER, LOGITS, batch

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def logits() -> dict[str, torch.Tensor]:
    return load_file(LOGITS)


def assert_computes(model, expected: torch.Tensor) -> None:
    with torch.no_grad():
        assert torch.allclose(model.eval()(**batch()).logits, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_of_an_older_version_loads_bit_for_bit_and_is_saved_under_the_same_keys(name, logits, tmp_path):
    build, _ = ADAPTERS[name]
    model = PeftModel.from_pretrained(build(), FOLDER / name)
    assert_computes(model, logits[name])
    model.save_pretrained(tmp_path)
    older, newer = load_file(FOLDER / name / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert older.keys() == newer.keys()
    assert all(torch.equal(tensor, newer[key]) and tensor.dtype == newer[key].dtype for key, tensor in older.items())
    assert_computes(PeftModel.from_pretrained(build(), tmp_path), logits[name])


@pytest.mark.parametrize("name", ["loramoe", "mov", "perft_e", "esft", "esft_lora", "routed_top_k"])
def test_an_adapter_of_an_older_version_loads_into_a_taken_name_and_through_transformers(name, logits):
    build, _ = ADAPTERS[name]
    model = PeftModel.from_pretrained(build(), FOLDER / name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".default." in key:
                parameter.zero_()
    model.load_adapter(FOLDER / name, adapter_name="default")
    assert_computes(model, logits[name])
    plain = build()
    plain.load_adapter(str(FOLDER / name))
    assert_computes(plain, logits[name])


def test_every_adapter_type_is_among_them():
    types = {PeftConfig.from_pretrained(FOLDER / name).peft_type.value for name in ADAPTERS}
    assert types == {"LORAMOE", "MOLORA", "SIRA", "MOV", "PERFT", "ESFT", "ROUTED"}
