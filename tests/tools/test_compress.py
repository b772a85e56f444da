"""What is stored of an adapter comes back as it was stored, and nothing else takes the folder for an adapter."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe_peft import EsftConfig, ExpertLoraConfig, LoraMoeConfig, MovConfig, RoutedConfig
from moe_peft.config.adapter_files import COMPRESSED, WEIGHTS
from moe_peft.tools import compress, compress_adapter, decompress_adapter
from tests.contract.cases import randomize, tiny_olmoe
from tests.tiny import tiny_llama
from tests.tools.exported import digest, logits
from tests.tuner.ways import as_hub_cache

KINDS = {
    "pairs": (tiny_llama, LoraMoeConfig(num_experts=3, r=4, modules_to_save=["lm_head"]), ["B"]),
    "vectors": (tiny_llama, MovConfig(num_experts=3), ["vectors"]),
    "pairs of matrices": (tiny_olmoe, ExpertLoraConfig(r=2), ["gate_up_B", "down_B"]),
    "diagonals": (tiny_llama, RoutedConfig(num_experts=3, r=2, experts="cp_diagonal"), ["B"]),
    "gains": (tiny_llama, RoutedConfig(num_experts=3, r=2, experts="normed"), ["gain"]),
    "whole routers": (tiny_llama, RoutedConfig(num_experts=3, r=2, router="bias_balanced", gate="sigmoid"), ["B"]),
}


def saved(build, config, folder, dtype=torch.float32):
    """An adapter before training, and after it."""
    model = get_peft_model(build(), config)
    model.save_pretrained(folder / "start")
    randomize(model)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and ".router." not in name:
            continue
        parameter.data += 0.01 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder / "adapter")
    return folder / "adapter"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [1.0, None])
def test_what_starts_at_a_known_value_is_ternary_around_it_and_all_else_is_bit_for_bit(kind, alpha, tmp_path):
    build, config, names = KINDS[kind]
    folder = saved(build, config, tmp_path)
    before = digest(tmp_path)
    found = compress_adapter(folder, tmp_path / "small", alpha=alpha)
    decompress_adapter(tmp_path / "small", tmp_path / "back")
    assert {key: own for key, own in digest(tmp_path).items() if not key.startswith(("small", "back"))} == before
    old, new = load_file(folder / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    assert old.keys() == new.keys()
    for key, tensor in old.items():
        if key in found.whole:
            assert torch.equal(new[key], tensor) and new[key].dtype == tensor.dtype
            continue
        assert key.rpartition(".")[2] in names
        change = tensor - (1.0 if names == ["vectors"] else 0.0)
        kept = new[key] - (1.0 if names == ["vectors"] else 0.0)
        scale = change.std(unbiased=False) if alpha else change.abs()[kept != 0].mean()
        values = kept[kept != 0].abs()
        torch.testing.assert_close(values, scale.expand_as(values), rtol=1e-4, atol=1e-6)
        assert abs(int((kept != 0).sum()) - 0.2 * kept.numel()) <= 1
        error = float((change - kept).norm() / change.norm())
        assert found.errors[key] == pytest.approx(error, abs=1e-5)
    assert {key.rpartition(".")[2] for key in found.errors} == set(names)
    with safe_open(folder / WEIGHTS, "pt") as one, safe_open(tmp_path / "back" / WEIGHTS, "pt") as other:
        assert one.metadata() == other.metadata()
    model = PeftModel.from_pretrained(build(), tmp_path / "back")
    assert logits(model).isfinite().all()
    decompress_adapter(tmp_path / "small", tmp_path / "twice")
    assert all(torch.equal(own, new[key]) for key, own in load_file(tmp_path / "twice" / WEIGHTS).items())


def test_with_the_start_every_trained_tensor_is_compressed_and_what_never_trained_is_not(tmp_path):
    config = RoutedConfig(num_experts=4, r=4, experts="sparse_down", target_modules=["q_proj", "up_proj"])
    for number, (build, own) in enumerate(((tiny_llama, config), (tiny_olmoe, EsftConfig(experts={"1": [1, 3]})))):
        folder = saved(build, own, tmp_path / str(number))
        given = {"initial": tmp_path / str(number) / "start"}
        found = compress_adapter(folder, tmp_path / f"small{number}", **given)
        assert any("experts" in key for key in found.errors) and not any("router" in key for key in found.errors)
        assert not number or not any("experts" in key for key in found.whole)
        for wrong in ({}, {"initial": folder}, {"initial": tmp_path}):
            with pytest.raises(ValueError, match=r"initial|not the adapter"):
                decompress_adapter(tmp_path / f"small{number}", tmp_path / "back", **wrong)
        decompress_adapter(tmp_path / f"small{number}", tmp_path / f"back{number}", **given)
        old, start = load_file(folder / WEIGHTS), load_file(tmp_path / str(number) / "start" / WEIGHTS)
        for key, tensor in load_file(tmp_path / f"back{number}" / WEIGHTS).items():
            change = old[key] - start[key]
            error = float((change - (tensor - start[key])).norm() / change.norm()) if bool(change.any()) else 0.0
            assert error == pytest.approx(found.errors.get(key, 0.0), abs=1e-3)
    assert not (tmp_path / "back").exists()


def test_from_zero_a_pair_takes_a_bit_and_a_fifth_for_each_number(tmp_path):
    folder = saved(tiny_llama, LoraMoeConfig(num_experts=8, r=8), tmp_path)
    whole = compress_adapter(folder, tmp_path / "whole")
    small = compress_adapter(folder, tmp_path / "small", from_zero=True)
    assert {key.rpartition(".")[2] for key in small.errors} == {"A", "B"}
    assert small.bytes_after < whole.bytes_after < whole.bytes_before
    assert str(small).startswith(f"{small.bytes_before:,} -> {(tmp_path / 'small' / COMPRESSED).stat().st_size:,}")
    numbers = sum(own.numel() for key, own in load_file(folder / WEIGHTS).items() if key in small.errors)
    parts = load_file(tmp_path / "small" / COMPRESSED)
    bits = sum(8 * own.numel() for key, own in parts.items() if key.endswith((":mask", ":sign")))
    assert bits / numbers == pytest.approx(1.2, abs=0.05)
    esft = saved(tiny_olmoe, EsftConfig(experts={"1": [1]}), tmp_path / "esft")
    with pytest.raises(ValueError, match="Give initial"):
        compress_adapter(esft, tmp_path / "none", from_zero=True)


def test_no_way_of_loading_takes_it_for_an_adapter(tmp_path):
    folder = saved(tiny_llama, LoraMoeConfig(num_experts=2), tmp_path)
    compress_adapter(folder, tmp_path / "small")
    model = tiny_llama()
    names = list(model.state_dict())
    for load in (
        lambda: PeftModel.from_pretrained(model, tmp_path / "small"),
        lambda: model.load_adapter(str(tmp_path / "small")),
        lambda: PeftModel.from_pretrained(model, "user/adapter", cache_dir=str(as_hub_cache(tmp_path / "small"))),
        lambda: compress_adapter(tmp_path / "small", tmp_path / "smaller"),
    ):
        with pytest.raises(ValueError, match="moe-peft decompress"):
            load()
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_come_back_in_their_own(dtype, tmp_path):
    folder = saved(tiny_llama, LoraMoeConfig(num_experts=2), tmp_path, dtype)
    compress_adapter(folder, tmp_path / "small", alpha=None, density=1.0)
    decompress_adapter(tmp_path / "small", tmp_path / "back")
    old, new = load_file(folder / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    assert {key: own.dtype for key, own in old.items()} == {key: own.dtype for key, own in new.items()}


def test_damaged_files_and_numbers_that_cannot_work_are_refused(tmp_path):
    folder = saved(tiny_llama, LoraMoeConfig(num_experts=2), tmp_path)
    for fields in (
        {"density": 0},
        {"density": 1.1},
        {"density": True},
        {"density": float("nan")},
        {"alpha": 0},
        {"alpha": "big"},
        {"from_zero": 1},
        {"initial": tmp_path / "nowhere"},
    ):
        with pytest.raises(ValueError, match=next(iter(fields)) if "initial" not in fields else "no folder"):
            compress_adapter(folder, tmp_path / "small", **fields)
    with pytest.raises(ValueError, match="moe-peft compress wrote"):
        decompress_adapter(folder, tmp_path / "back")
    compress_adapter(folder, tmp_path / "small")
    path = tmp_path / "small" / COMPRESSED
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    mask = next(key for key in tensors if key.endswith(":mask"))
    other = {**metadata, "moe_peft_compressed": json.dumps({"version": 2})}
    for broken, about in (
        ({key: own for key, own in tensors.items() if key != mask}, metadata),
        ({**tensors, mask: tensors[mask][:-1].clone()}, metadata),
        (tensors, other),
    ):
        save_file(broken, path, metadata=about)
        with pytest.raises(ValueError, match=r"damaged|upgrade"):
            decompress_adapter(tmp_path / "small", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_an_interruption_leaves_no_half_folder(tmp_path, monkeypatch):
    folder = saved(tiny_llama, LoraMoeConfig(num_experts=2), tmp_path)
    compress_adapter(folder, tmp_path / "small")
    before = sorted(tmp_path.iterdir())

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(compress, "save_file", interrupted)
    for write in (compress_adapter, decompress_adapter):
        with pytest.raises(KeyboardInterrupt):
            write(folder if write is compress_adapter else tmp_path / "small", tmp_path / "other")
        assert sorted(tmp_path.iterdir()) == before
