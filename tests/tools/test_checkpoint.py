"""Tensors of a checkpoint are read one by one and overwritten in place, with everything else kept to the last bit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_peft.tools.checkpoint import INDEX, Checkpoint, overwriting


def two_shards(folder):
    folder.mkdir()
    first = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(2.5, dtype=torch.bfloat16)}
    second = {"c": torch.ones(3, dtype=torch.float16), "n": torch.tensor([1, 2])}
    save_file(first, folder / "model-1.safetensors", metadata={"format": "pt", "own": "text"})
    save_file(second, folder / "model-2.safetensors")
    shards = {**dict.fromkeys(first, "model-1.safetensors"), **dict.fromkeys(second, "model-2.safetensors")}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    return {**first, **second}


def test_tensors_of_all_shards_are_read_as_they_are(tmp_path):
    expected = two_shards(tmp_path / "base")
    found = Checkpoint(tmp_path / "base")
    assert found.tensors.keys() == expected.keys() and len(found.files) == 2
    assert all(torch.equal(found.read(name), own) for name, own in expected.items())


def test_what_is_not_written_keeps_every_byte(tmp_path):
    two_shards(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "copy")
    checkpoint = Checkpoint(tmp_path / "base")
    with overwriting(checkpoint, tmp_path / "copy") as files:
        files.write("a", -torch.arange(6.0).view(3, 2).T)
        files.write("b", torch.tensor(7.0, dtype=torch.bfloat16))
    assert files.written == {"a", "b"}
    second = "model-2.safetensors"
    assert (tmp_path / "copy" / second).read_bytes() == (tmp_path / "base" / second).read_bytes()
    changed = load_file(tmp_path / "copy" / "model-1.safetensors")
    assert torch.equal(changed["a"], -torch.arange(6.0).view(3, 2).T) and changed["b"] == 7
    assert Checkpoint(tmp_path / "copy").tensors == checkpoint.tensors


def test_other_dtypes_and_shapes_are_refused(tmp_path):
    two_shards(tmp_path / "base")
    with overwriting(Checkpoint(tmp_path / "base"), tmp_path / "base") as files:
        for name, tensor, message in (
            ("n", torch.tensor([1, 2]), "nothing can be merged"),
            ("a", torch.zeros(3, 2), "differ"),
            ("c", torch.ones(3), "differ"),
        ):
            with pytest.raises(ValueError, match=message):
                files.write(name, tensor)


@pytest.mark.parametrize("content", [b"", b"\xff" * 16, b"\x02" + b"\0" * 7 + b"[]", (10**6).to_bytes(8, "little")])
def test_a_damaged_shard_is_refused(content, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="truncated or damaged"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": {"a": "../x"}}', '{"weight_map": {"a": "lost"}}'])
def test_an_index_that_names_no_shards_of_the_folder_is_refused(index, tmp_path):
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(ValueError, match=r"no index|does not hold"):
        Checkpoint(tmp_path)


def test_a_folder_without_safetensors_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="save_pretrained"):
        Checkpoint(tmp_path)
