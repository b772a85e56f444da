"""What cannot be pushed is refused before anything is sent, or any token is looked for."""

from __future__ import annotations

import json

import pytest
from huggingface_hub.errors import HFValidationError
from peft import LoraConfig, get_peft_model

from moe_peft import LoraMoeConfig, MoePeftWarning, push_adapter
from tests.tiny import tiny_llama


@pytest.fixture
def folder(tmp_path):
    get_peft_model(tiny_llama(), LoraMoeConfig(num_experts=2)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def refused(match, model_or_folder, repo_id="user/name", **arguments):
    with pytest.raises(ValueError, match=match):
        push_adapter(model_or_folder, repo_id, **arguments)


def test_a_folder_without_an_adapter(tmp_path):
    refused(r"holds no adapter_config\.json, .* model\.save_pretrained or trainer\.save_model", tmp_path)
    refused(r"no-such-folder holds no adapter_config\.json", tmp_path / "no-such-folder")


def test_a_folder_without_weights(folder):
    (folder / "adapter_model.safetensors").unlink()
    refused(r"holds no adapter_model\.safetensors", folder)
    (folder / "adapter_model.bin").touch()
    refused("is a pickle", folder)


def test_damaged_weights(folder):
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    refused("truncated or damaged", folder)


def test_an_adapter_of_another_type(tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig())
    refused(r"The adapter 'default' is of the type .*LORA, .*model\.push_to_hub", model)
    model.save_pretrained(tmp_path)
    refused(r"adapter_config\.json is of the type .*LORA, .*model\.push_to_hub", tmp_path)


def test_an_unknown_type_and_a_file_that_is_no_json(folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": "OF_TOMORROW"}))
    refused(r"unknown peft_type 'OF_TOMORROW'\. Upgrade", folder)
    path.write_text("{")
    refused("is not valid JSON", folder)


@pytest.mark.parametrize("text", ["[]", "null", '{"peft_type": []}', "{}", "[" * 100_000])
def test_a_configuration_that_is_none(text, folder):
    (folder / "adapter_config.json").write_text(text)
    refused(r"adapter_config\.json", folder)


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json", "notes/a.txt"]
)
def test_a_link_that_leaves_the_folder_is_not_published(name, folder, tmp_path):
    outside, inside = tmp_path / "outside", folder / name
    inside.parent.mkdir(exist_ok=True)
    outside.write_bytes(inside.read_bytes() if inside.exists() else b"secret")
    inside.unlink(missing_ok=True)
    inside.symlink_to(outside)
    refused(
        rf"{name} is a link to .*outside, outside of the folder", folder, include=["notes/*"] if "/" in name else []
    )


def test_a_linked_folder_of_files_is_not_published(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("secret")
    (folder / "notes").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    refused(r"a\.txt is a link to .*elsewhere", folder, include=["notes/*"])


def test_a_model_without_an_adapter_or_with_several_active_ones():
    refused(r"takes a PeftModel or a folder, not LlamaForCausalLM", tiny_llama())
    model = get_peft_model(tiny_llama(), LoraMoeConfig(num_experts=2))
    model.add_adapter("other", LoraMoeConfig(num_experts=3))
    model.base_model.set_adapter(["default", "other"])
    refused(r"\['default', 'other'\] are active; .*set_adapter", model)


def test_names_and_patterns_that_cannot_work(folder, tmp_path):
    refused(r"base_model='/data/base' must be the name of a model on the Hub", folder, base_model="/data/base")
    (tmp_path / "secret").touch()
    for pattern in ("no_such_file*", "../secret", str(tmp_path / "secret")):
        refused(r"matches no file inside .*Correct it", folder, include=[pattern])
    with pytest.raises(HFValidationError, match="a/b/c"):
        push_adapter(folder, "a/b/c")


def test_a_base_model_outside_the_hub_is_warned_of_and_offline_mode_is_named(folder):
    with (
        pytest.warns(MoePeftWarning, match=r"base model None is not a name on the Hub.*base_model='org/name'"),
        pytest.raises(ConnectionError, match=r"did not finish: .*offline mode .*push_adapter"),
    ):
        push_adapter(folder, "user/name", token="hf_token")


def test_an_active_adapter_of_another_name_is_the_one_that_is_pushed(tmp_path, monkeypatch):
    model = get_peft_model(tiny_llama(), LoraMoeConfig(num_experts=2))
    model.add_adapter("second", LoraMoeConfig(num_experts=3))
    model.set_adapter("second")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.warns(MoePeftWarning), pytest.raises(ConnectionError, match=r"unchanged in .*/second"):
        push_adapter(model, "user/name", token="hf_token")
    (saved,) = tmp_path.glob("moe_peft_*")
    assert {path.name for path in (saved / "second").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert not (saved / "adapter_config.json").exists()
