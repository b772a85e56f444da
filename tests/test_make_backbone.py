import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train"))

import make_backbone
import stdlib_docs

TINY = make_backbone.BackboneSettings(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    block_size=32,
    batch_size=2,
    num_steps=12,
    warmup_steps=2,
)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in stdlib_docs.FILE_NAMES:
        texts = [f"module.name{index}(x)\n\nReturn the value number {index}.\n" for index in range(60)]
        (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


@pytest.fixture(scope="module")
def backbone(data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "backbone"
    return folder, make_backbone.make_backbone(folder, data_dir, settings=TINY)


def forbid_training(monkeypatch):
    def fail(*args):
        raise AssertionError("trained again")

    monkeypatch.setattr(make_backbone, "_pretrain", fail)


def test_record_and_checkpoint(backbone):
    folder, record = backbone
    assert record == make_backbone.read_record(folder)
    assert record["num_steps"] == 12 and record["train_loss"] > 0 and record["held_out_loss"] > 0
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.num_parameters() == record["num_parameters"]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (folder / "model.safetensors").exists()


def test_tokenizer_round_trips(backbone):
    tokenizer = AutoTokenizer.from_pretrained(backbone[0])
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, None}) == 4
    for text in ("Return  two  spaces.\n\n\tTab", "h\u00e9llo \u4f60\u597d \U0001f600", " leading"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_prompt_tokens_are_a_prefix_of_the_whole(backbone):
    tokenizer = AutoTokenizer.from_pretrained(backbone[0])
    for prompt in ("Summary of module.name(x, /):", "Kind of module.name:"):
        prompt_ids = tokenizer(prompt)["input_ids"]
        assert tokenizer(prompt + " Return the value.")["input_ids"][: len(prompt_ids)] == prompt_ids


def test_cache_is_reused(backbone, data_dir, monkeypatch):
    folder, record = backbone
    forbid_training(monkeypatch)
    assert make_backbone.make_backbone(folder, data_dir, settings=TINY) == record
    with pytest.raises(AssertionError, match="trained again"):
        make_backbone.make_backbone(folder, data_dir, settings=TINY, force=True)


def test_other_settings_or_data_train_again(backbone, data_dir, tmp_path, monkeypatch):
    folder, record = backbone
    other_seed = make_backbone.dataclasses.replace(TINY, seed=1)
    for name in stdlib_docs.FILE_NAMES:
        (tmp_path / name).write_text((data_dir / name).read_text().replace("value", "number"))
    forbid_training(monkeypatch)
    for settings, folder_of_data in ((other_seed, data_dir), (TINY, tmp_path)):
        with pytest.raises(AssertionError, match="trained again"):
            make_backbone.make_backbone(folder, folder_of_data, settings=settings)
    assert make_backbone.read_record(folder) == record


def test_interrupted_write_leaves_no_cache(data_dir, tmp_path, monkeypatch):
    def interrupt(self, folder):
        (Path(folder) / "half").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(make_backbone.PreTrainedTokenizerFast, "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_backbone.make_backbone(tmp_path / "backbone", data_dir, settings=TINY)
    assert list(tmp_path.iterdir()) == []


def test_same_seed_reproduces_the_loss(backbone, data_dir, tmp_path):
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    record = make_backbone.make_backbone(tmp_path / "backbone", data_dir, settings=TINY)
    assert record == backbone[1]
    assert torch.equal(torch.random.get_rng_state(), state)
    first, second = (AutoModelForCausalLM.from_pretrained(folder) for folder in (backbone[0], tmp_path / "backbone"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_training_lowers_the_loss(backbone, data_dir, tmp_path):
    longer = make_backbone.dataclasses.replace(TINY, num_steps=60)
    record = make_backbone.make_backbone(tmp_path / "backbone", data_dir, settings=longer)
    assert record["train_loss"] < backbone[1]["train_loss"]


def test_folder_with_other_files_is_not_replaced(data_dir, tmp_path):
    (tmp_path / "precious.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="choose another output_dir"):
        make_backbone.make_backbone(tmp_path, data_dir, settings=TINY)
    assert (tmp_path / "precious.txt").read_text() == "keep"


def test_absent_data_is_generated(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(stdlib_docs, "write_splits", lambda folder: calls.append(folder))
    with pytest.raises(FileNotFoundError):
        make_backbone.make_backbone(tmp_path / "backbone", tmp_path / "data", settings=TINY)
    assert calls == [tmp_path / "data"]
