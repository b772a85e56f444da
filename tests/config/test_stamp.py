"""What a file says of its tensors: written without touching them, read with care, compared field by field."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe_peft.config.adapter_files import read_header
from moe_peft.config.stamp import EMBEDDINGS, MEANING, check_meaning, saved_embeddings, saved_meaning, stamp


@pytest.fixture
def path(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.zeros(0, 2), "d": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "weights", metadata={"format": "pt", "mine": "x"})
    return tmp_path / "weights"


def test_tensors_stay_bit_for_bit_and_other_metadata_too(path):
    before = load_file(path)
    stamp(path, {"r": 2, "adapter_type": "X"}, embeddings=["b", "a"])
    stamp(path, {"r": 3, "adapter_type": "X"}, embeddings=["b", "a"])
    after = load_file(path)
    assert before.keys() == after.keys() and all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["mine"] == "x" and file.metadata()["format"] == "pt"
    header = read_header(path)
    assert saved_meaning(header) == {"r": 3, "adapter_type": "X"} and saved_embeddings(header) == {"a", "b"}


def test_a_file_without_it_says_nothing(path):
    assert saved_meaning(read_header(path)) is None and saved_embeddings(read_header(path)) == frozenset()


@pytest.mark.parametrize("text", ["", "[]", "{", "5", "[" * 100_000])
def test_what_cannot_be_read_is_refused_for_the_meaning_and_grants_nothing_for_embeddings(text, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "weights", metadata={MEANING: text, EMBEDDINGS: text})
    header = read_header(tmp_path / "weights")
    with pytest.raises(ValueError, match=r"metadata 'moe_peft' .* cannot be read"):
        saved_meaning(header)
    assert saved_embeddings(header) == frozenset()


def test_numbers_compare_by_value_and_fields_that_came_later_are_not_missed():
    check_meaning("f", json.loads('{"alpha": 8.0, "experts": {"1": [2]}}'), {"alpha": 8, "experts": {"1": [2]}}, "x")
    check_meaning("f", {"alpha": 8}, {"alpha": 8, "later": 1}, "x")


def test_differences_are_named_with_both_values():
    with pytest.raises(ValueError, match=r"f holds weights of a=1, b=\[2\], but x has a=2, b=\[3\]"):
        check_meaning("f", {"a": 1, "b": [2], "c": 3}, {"a": 2, "b": [3], "c": 3}, "x")
    with pytest.raises(ValueError, match="saved with unheard=1, which this version of peft-moe does not know"):
        check_meaning("f", {"a": 1, "unheard": 1}, {"a": 1}, "x")
    with pytest.raises(ValueError, match="and 4 more") as refused:
        check_meaning("f", dict.fromkeys("abcdefghij", "y" * 500), dict.fromkeys("abcdefghij", 1), "x")
    assert len(str(refused.value)) < 3500
