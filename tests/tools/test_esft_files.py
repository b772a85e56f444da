"""Adapters in the ESFT authors' form are loaded and written bit for bit; what does not fit is refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from moe_peft import EsftConfig
from moe_peft.backbone.without_weights import meta_model
from moe_peft.tools import export_esft, import_esft
from moe_peft.tools.esft_files import SELECTION
from tests.backbones.models import tiny_model
from tests.contract.cases import adapter_parameters, randomize, tiny_olmoe
from tests.tools.exported import logits, tensors

SELECTED = {"0": [4, 1], "1": [0]}


def deepseek(**fields):
    return tiny_model("deepseek_v2", **fields)


def authors_folder(model, folder, *, prefix="model.", shared=False, shards=2):
    """What the authors' training saves: each selected expert's own matrices, changed, in several files."""
    folder.mkdir()
    own = {"experts": SELECTED, "shared_experts": shared, "non_expert_modules": False}
    (folder / SELECTION).write_text(json.dumps(own))
    found = {}
    for layer, ids in SELECTED.items():
        mlp = model.model.layers[int(layer)].mlp
        for expert in ids:
            gate, up = mlp.experts.gate_up_proj[expert].detach().chunk(2)
            for name, own in (("gate", gate), ("up", up), ("down", mlp.experts.down_proj[expert].detach())):
                found[f"{prefix}layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"] = own * 1.5 + 0.01
        for name, own in mlp.shared_experts.state_dict().items() if shared else ():
            found[f"{prefix}layers.{layer}.mlp.shared_experts.{name}"] = own * 0.5
    keys = sorted(found)
    for shard in range(shards):
        own = {key: found[key].clone() for key in keys[shard::shards]}
        save_file(own, folder / f"model-{shard + 1:05}-of-{shards:05}.safetensors")
    return found


@pytest.mark.parametrize("fields", [{"prefix": ""}, {"shared": True, "shards": 1}])
def test_the_authors_files_compute_the_authors_model(fields, tmp_path):
    base = deepseek()
    found = authors_folder(base, tmp_path / "adapter", **fields)
    expected = deepseek()
    with torch.no_grad():
        for key, own in found.items():
            _, _, layer, _, kind, *rest = f"model.{key.removeprefix('model.')}".split(".")
            mlp = expected.model.layers[int(layer)].mlp
            if kind == "shared_experts":
                mlp.shared_experts.get_parameter(".".join(rest)).copy_(own)
                continue
            stack = mlp.experts.down_proj if rest[1] == "down_proj" else mlp.experts.gate_up_proj
            half = {"gate_proj": slice(0, own.shape[0]), "up_proj": slice(own.shape[0], None)}
            stack[int(rest[0]), half.get(rest[1], slice(None))] = own
    model = import_esft(base, tmp_path / "adapter")
    assert model.peft_config["default"].experts == {"0": [1, 4], "1": [0]}
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=1e-6)
    export_esft(model, tmp_path / "again")
    again = tensors(tmp_path / "again")
    assert all(torch.equal(again[f"model.{key.removeprefix('model.')}"], own) for key, own in found.items())
    assert len(again) == len(found)


def test_the_form_of_stock_peft_comes_out_equal(tmp_path):
    base = deepseek()
    authors_folder(base, tmp_path / "adapter")
    model = import_esft(base, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "peft")
    loaded = PeftModel.from_pretrained(deepseek(), tmp_path / "peft")
    assert torch.equal(logits(loaded), logits(model))


def test_a_base_without_memory_is_given_the_adapter_alone(tmp_path):
    base = deepseek()
    authors_folder(base, tmp_path / "adapter", shared=True)
    shapes = import_esft(meta_model(base.config), tmp_path / "adapter")
    assert shapes.get_base_model().lm_head.weight.is_meta
    shapes.save_pretrained(tmp_path / "peft")
    own = PeftModel.from_pretrained(deepseek(), tmp_path / "peft")
    assert torch.equal(logits(own), logits(import_esft(base, tmp_path / "adapter")))


def test_a_round_trip_through_the_authors_form_changes_no_bit(tmp_path):
    model = get_peft_model(tiny_olmoe(), EsftConfig(experts={"0": [2, 1], "1": [0]}))
    randomize(model)
    export_esft(model, tmp_path / "esft", max_shard_size="10KB")
    assert len(list((tmp_path / "esft").glob("*.safetensors"))) > 1
    again = import_esft(tiny_olmoe(), tmp_path / "esft")
    for one, other in zip(adapter_parameters(model).values(), adapter_parameters(again).values(), strict=True):
        assert torch.equal(one, other)


def change(folder, edit):
    path = sorted(folder.glob("*.safetensors"))[0]
    own = load_file(path)
    edit(own)
    save_file(own, path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda own: own.pop(sorted(own)[0]), "lacks"),
        (lambda own: own.update({"model.layers.1.mlp.experts.3.up_proj.weight": torch.ones(2)}), "more than"),
        (lambda own: own.update({"model.embed_tokens.weight": torch.ones(2)}), "no matrix of an expert"),
        (lambda own: own.update({sorted(own)[0]: torch.ones(2, 2)}), "of another base model"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_model_stays(edit, message, tmp_path):
    base = deepseek()
    authors_folder(base, tmp_path / "adapter")
    change(tmp_path / "adapter", edit)
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=message):
        import_esft(base, tmp_path / "adapter")
    assert [name for name, _ in base.named_modules()] == names and not hasattr(base, "peft_config")


def test_a_tensor_in_two_files_and_a_configuration_of_more_than_experts_are_refused(tmp_path):
    base = deepseek()
    authors_folder(base, tmp_path / "adapter")
    first = sorted((tmp_path / "adapter").glob("*.safetensors"))[0]
    (tmp_path / "adapter" / "twice.safetensors").write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match="both hold"):
        import_esft(base, tmp_path / "adapter")
    own = {"experts": SELECTED, "shared_experts": False, "non_expert_modules": True}
    (tmp_path / "adapter" / SELECTION).write_text(json.dumps(own))
    with pytest.raises(ValueError, match="non_expert_modules"):
        import_esft(base, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("build", "fields", "message"),
    [
        (tiny_olmoe, {"expert_adapter": "lora"}, "no adapter of EsftConfig"),
        (tiny_olmoe, {"train_router": True}, "no place for"),
        (lambda: tiny_model("gpt_oss"), {}, "has others"),
    ],
)
def test_what_the_form_cannot_hold_is_refused(build, fields, message, tmp_path):
    model = get_peft_model(build(), EsftConfig(experts={"1": [1]}, **fields))
    with pytest.raises(ValueError, match=message):
        export_esft(model, tmp_path / "out")
    assert not any(tmp_path.iterdir())
