"""Files of texts become batches of their groups, and what cannot be read is named by its line."""

from __future__ import annotations

import json

import pytest
import torch
from peft import get_peft_model

import moe_peft
from moe_peft.tools.report.texts import make_batches, padded, read_texts
from tests.tiny import tiny_llama, tiny_t5
from tests.train.tiny_run import make_tokenizer


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_each_file_is_a_group_and_kinds_of_rows_are_read(tmp_path):
    talk = [{"role": "user", "content": "w7"}, {"role": "assistant", "content": "w8"}]
    a = write(tmp_path / "a.jsonl", {"text": "w7 w8"}, "", {"prompt": "w7", "completion": " w8"})
    b = write(
        tmp_path / "b.json", json.dumps([{"messages": talk}, {"prompt": "w9", "chosen": " w8", "rejected": "w7"}])
    )
    found = read_texts([a, b], make_tokenizer())
    assert [own.parts for own in found["a"]] == [("w7 w8",), ("w7", " w8")]
    assert found["b"][0].parts == ("w5 w7 w4 w8</s>",) and found["b"][1].parts == ("w9", " w8")


def test_a_column_makes_groups_across_files(tmp_path):
    a = write(tmp_path / "a.jsonl", {"text": "w7", "task": "law"}, {"text": "w8", "task": 3})
    b = write(tmp_path / "b.jsonl", *({"text": "w9", "task": "law"} for _ in range(3)))
    found = read_texts([a, b], make_tokenizer(), group_column="task", max_rows=2)
    assert {group: len(own) for group, own in found.items()} == {"law": 2, "3": 1}


def test_files_of_one_name_stay_apart(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "data.jsonl", {"text": "w7"})
    assert len(read_texts([tmp_path / "x/data.jsonl", tmp_path / "y/data.jsonl"], make_tokenizer())) == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"text": "w7"}', '{"text": '], "line 2 is no JSON"),
        (["[1]"], "line 1 holds 1, not an object"),
        (['"text"'], "line 1 holds 'text', not an object"),
        (['{"question": "w7"}'], r"line 1 has the columns \['question'\], but needs"),
        (['{"text": 7}'], "neither a text nor a list of messages"),
        ([""], "there are no rows"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read_texts([write(tmp_path / "a.jsonl", *rows)], make_tokenizer())


def test_missing_files_groups_and_wrong_encodings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_texts([tmp_path / "none.jsonl"], make_tokenizer())
    with pytest.raises(ValueError, match="is a folder"):
        read_texts([tmp_path], make_tokenizer())
    with pytest.raises(ValueError, match="no file of texts"):
        read_texts([], make_tokenizer())
    file = write(tmp_path / "a.jsonl", {"text": "w7"})
    with pytest.raises(ValueError, match="has no group: its column 'task' holds None"):
        read_texts([file], make_tokenizer(), group_column="task")
    with pytest.raises(ValueError, match="max_rows=0"):
        read_texts([file], make_tokenizer(), max_rows=0)
    file.write_bytes(b'{"text": "\xff"}')
    with pytest.raises(ValueError, match="not in UTF-8"):
        read_texts([file], make_tokenizer())


def test_batches_are_padded_cut_and_carry_integer_groups(tmp_path):
    rows = [{"text": " ".join(["w7"] * n), "task_type": n % 2} for n in (3, 9, 1)]
    texts = read_texts([write(tmp_path / "a.jsonl", *rows)], make_tokenizer())
    model = tiny_llama()
    first, second = make_batches(texts, make_tokenizer(), model, batch_size=2, max_length=5)["a"]
    assert first["input_ids"].tolist() == [[7, 7, 7, 0, 0], [7] * 5] and first["attention_mask"].sum() == 8
    assert second["input_ids"].tolist() == [[7]] and "task_type" not in first
    config = moe_peft.LoraMoeConfig(task_type="CAUSAL_LM", num_experts=4, expert_groups=[0, 0, 1, 1])
    grouped = get_peft_model(tiny_llama(), config)
    texts = read_texts([tmp_path / "a.jsonl"], make_tokenizer(), group_column="task_type")
    made = make_batches(texts, make_tokenizer(), grouped)
    assert {group: own[0]["task_type"].tolist() for group, own in made.items()} == {"1": [1, 1, 1]}


def test_a_decoder_reads_the_completion_shifted(tmp_path):
    texts = read_texts([write(tmp_path / "a.jsonl", {"prompt": "w7 w8", "completion": "w9 w10"})], make_tokenizer())
    (batch,) = make_batches(texts, make_tokenizer(), tiny_t5())["a"]
    assert batch["input_ids"].tolist() == [[7, 8]] and batch["decoder_input_ids"].tolist() == [[0, 9]]


def test_a_tokenizer_without_padding_is_padded_all_the_same():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    found = padded([[5], [6, 7]], tokenizer)
    assert found["input_ids"].tolist() == [[5, 2], [6, 7]] and torch.equal(
        found["attention_mask"][0], torch.tensor([1, 0])
    )
