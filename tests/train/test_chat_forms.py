"""Conversations of other programs are messages with the roles that chat templates know."""

from __future__ import annotations

import json

import pytest
from chat_forms import as_messages
from datasets import Dataset
from transformers import AutoTokenizer

from tests.train.tiny_run import make_base, run_here, write_run

TURNS = [{"from": "system", "value": "w9"}, {"from": "human", "value": "w5"}, {"from": "gpt", "value": "w6"}]
MESSAGES = [
    {"role": "system", "content": "w9"},
    {"role": "user", "content": "w5"},
    {"role": "assistant", "content": "w6"},
]


@pytest.mark.parametrize("column", ["conversations", "messages"])
@pytest.mark.parametrize("streamed", [False, True])
def test_speakers_and_their_words_become_roles_and_contents(column, streamed):
    rows = Dataset.from_list([{column: TURNS, "id": i} for i in range(3)])
    rows = as_messages(rows.to_iterable_dataset() if streamed else rows)
    assert [row["messages"] for row in rows] == [MESSAGES] * 3
    assert [row["id"] for row in rows] == [0, 1, 2] and all("conversations" not in row for row in rows)


def test_conversations_with_roles_are_renamed_alone_and_other_rows_stay():
    rows = Dataset.from_list([{"conversations": MESSAGES}])
    assert as_messages(rows).to_list() == [{"messages": MESSAGES}]
    for other in ({"messages": MESSAGES}, {"text": "w5"}, {"conversations": "w5"}, {"conversations": ["w5"]}):
        rows = Dataset.from_list([other])
        assert as_messages(rows) is rows
    empty = Dataset.from_dict({"conversations": []})
    assert as_messages(empty) is empty


def test_a_run_trains_on_the_roles_of_the_template(tmp_path):
    base = make_base(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text((json.dumps({"conversations": TURNS[1:]}) + "\n") * 2)
    run = write_run(tmp_path, model_name_or_path=base, dataset_name=str(tmp_path / "rows.jsonl"), max_steps=1)
    trainer = run_here("sft", run)
    tokenizer = AutoTokenizer.from_pretrained(base)
    expected = tokenizer.apply_chat_template(MESSAGES[1:], return_dict=True)["input_ids"]
    assert trainer.train_dataset[0]["input_ids"] == expected
