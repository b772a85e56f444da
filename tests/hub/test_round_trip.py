"""An adapter that one process pushes is the same in another one, whichever way it is loaded, and its card is right."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from safetensors.torch import load
from trl import SFTConfig, SFTTrainer

from moe_peft import LoraMoeConfig
from tests.hub.client import Client
from tests.hub.conftest import BASE, content_of
from tests.integrations.test_callback import rows, tiny_tokenizer  # noqa: F401
from tests.tiny import tiny_llama

pytestmark = pytest.mark.hub
WAYS = ("PeftModel", "AutoPeftModel", "load_adapter")


@pytest.fixture(scope="module")
def reader(server, tmp_path_factory):
    """A process that has neither a token nor anything in its cache."""
    with Client(server, tmp_path_factory.mktemp("loading")) as client:
        yield client


@pytest.mark.parametrize("upload_mode", ["lfs", "regular"])
def test_every_way_of_loading_gives_the_logits_of_the_process_that_pushed(hub, client, reader, tmp_path, upload_mode):
    hub.upload_mode, name = upload_mode, f"user/{upload_mode}"
    url = client.call("push_model", base=BASE, name=name, logits=str(tmp_path / "pushed.pt"), token=hub.token)
    assert url.startswith(f"{hub.url}/{name}/commit/")
    assert hub.files(name).keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert hub.messages(name) == ["Upload adapter"]
    pushed = torch.load(tmp_path / "pushed.pt")
    assert not torch.equal(pushed, tiny_llama().eval()(torch.arange(3, 13)[None]).logits)
    for way in WAYS:
        reader.call("load", way=way, base=BASE, name=name, logits=str(tmp_path / "loaded.pt"))
        assert torch.equal(torch.load(tmp_path / "loaded.pt"), pushed), way


def test_the_card_on_the_hub_says_what_the_adapter_is(hub, client, tmp_path):
    arguments = {"token": hub.token, "metrics": {"eval_loss": 1.25}, "private": True, "commit_message": "First try"}
    client.call("push_model", base=BASE, name="user/card", logits=str(tmp_path / "logits.pt"), **arguments)
    files = hub.files("user/card")
    card = ModelCard(files["README.md"].decode())
    assert card.data.to_dict() == {
        "library_name": "peft",
        "base_model": BASE,
        "base_model_relation": "adapter",
        "pipeline_tag": "text-generation",
        "tags": [f"base_model:adapter:{BASE}", "loramoe", "moe-peft", "peft", "transformers"],
    }
    count = sum(tensor.numel() for tensor in load(files["adapter_model.safetensors"]).values())
    for part in (LoraMoeConfig.equation, "arxiv.org/abs/2312.09979", f"| {count:,} |", "| eval_loss | 1.25 |"):
        assert part in card.text
    example = card.text.split("```python\n")[1].split("```")[0]
    assert example.startswith("import moe_peft\n")
    assert f'from_pretrained("{BASE}")' in example and 'from_pretrained(model, "user/card")' in example
    assert hub.repositories["user/card"].private and hub.messages("user/card") == ["First try"]


def test_the_example_of_the_card_loads_the_adapter(hub, client, reader, tmp_path):
    client.call("push_model", base=BASE, name="user/example", logits=str(tmp_path / "pushed.pt"), token=hub.token)
    example = hub.files("user/example")["README.md"].decode().split("```python\n")[1].split("```")[0]
    reader.call("run_example", example=example, logits=str(tmp_path / "loaded.pt"))
    assert torch.equal(torch.load(tmp_path / "loaded.pt"), torch.load(tmp_path / "pushed.pt"))


def test_the_stock_push_loses_the_card(hub, client):
    """The reason for push_adapter; when this fails, peft or transformers has improved."""
    client.call("push_stock", base=BASE, name="user/stock", token=hub.token)
    data = ModelCard(hub.files("user/stock")["README.md"].decode()).data
    assert data.library_name == "transformers" and data.base_model is None and data.tags == []


def test_a_second_push_replaces_files_of_the_same_name_alone_and_a_branch_leaves_main(hub, client, folder):
    client.call("push_folder", folder=str(folder), name="user/twice", token=hub.token)
    (folder / "notes.txt").write_text("kept")
    client.call("push_folder", folder=str(folder), name="user/twice", token=hub.token, include=["notes.txt"])
    (folder / "notes.txt").unlink()
    client.call("push_folder", folder=str(folder), name="user/twice", token=hub.token, metrics={"x": 1})
    assert len(hub.messages("user/twice")) == 3 and hub.files("user/twice")["notes.txt"] == b"kept"
    client.call(
        "push_folder", folder=str(folder), name="user/twice", token=hub.token, metrics={"x": 2}, revision="dev"
    )
    assert b"| x | 1 |" in hub.files("user/twice")["README.md"]
    assert b"| x | 2 |" in hub.files("user/twice", "dev")["README.md"] and len(hub.messages("user/twice")) == 3


def test_an_adapter_trained_on_a_local_copy_is_linked_to_the_model_it_is_a_copy_of(hub, client, reader, tmp_path):
    base = tmp_path / "copy"
    tiny_llama().save_pretrained(base)
    pushed = {"name": "user/copied", "logits": str(tmp_path / "pushed.pt"), "token": hub.token}
    client.call("push_model", base=str(base), base_model=BASE, **pushed)
    files = hub.files("user/copied")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == BASE
    assert ModelCard(files["README.md"].decode()).data.base_model == BASE
    reader.call("load", way="AutoPeftModel", base="", name="user/copied", logits=str(tmp_path / "loaded.pt"))
    assert torch.equal(torch.load(tmp_path / "loaded.pt"), torch.load(tmp_path / "pushed.pt"))


def test_a_trainers_folder_is_pushed_without_its_working_files_and_trls_card_is_corrected(
    hub,
    client,
    tmp_path,
    tiny_tokenizer,  # noqa: F811
):
    model = tiny_llama()
    model.name_or_path = model.config._name_or_path = BASE
    arguments = SFTConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=1,
        save_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    data = Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows()])
    config = LoraMoeConfig(task_type="CAUSAL_LM", num_experts=2)
    trainer = SFTTrainer(model, arguments, train_dataset=data, processing_class=tiny_tokenizer, peft_config=config)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(model_name="name-of-the-run", tags=["mine"])
    folder = tmp_path / "run"
    assert ModelCard.load(folder / "README.md").data.library_name == "transformers"
    assert (folder / "checkpoint-1/optimizer.pt").is_file() and (folder / "training_args.bin").is_file()
    before = content_of(folder)

    client.call("push_folder", folder=str(folder), name="user/trained", token=hub.token)

    assert content_of(folder) == before
    expected = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    expected |= {"tokenizer.json", "tokenizer_config.json"}
    assert hub.files("user/trained").keys() == expected
    card = ModelCard(hub.files("user/trained")["README.md"].decode())
    assert (card.data.library_name, card.data.base_model_relation) == ("peft", "adapter")
    assert {"trl", "sft", "mine", "moe-peft", "peft", "loramoe"} <= set(card.data.tags)
    assert "pipeline(" not in card.text and "import moe_peft" in card.text and "Cite TRL as" in card.text
