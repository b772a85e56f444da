"""Rows without what a trainer reads are refused with an example, before a model is loaded."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from data_checks import COLUMNS, EXAMPLES, check_columns, check_template
from datasets import Dataset

from tests.train.test_data import ROWS
from tests.train.tiny_run import make_tokenizer

PLAIN = SimpleNamespace()


@pytest.mark.parametrize("script", COLUMNS)
def test_the_example_of_a_script_has_its_columns_and_other_columns_are_refused_with_it(script):
    check_columns(script, Dataset.from_list([json.loads(EXAMPLES[script])]), PLAIN, "file")
    rows = Dataset.from_list([{"question": "q", "answer": "a"}])
    with pytest.raises(ValueError, match=rf"file has the columns question, answer, but {script} needs") as error:
        check_columns(script, rows, PLAIN, "file")
    assert EXAMPLES[script] in str(error.value) and "'question': 'q'" in str(error.value)


def test_a_column_of_text_may_have_another_name():
    rows = Dataset.from_list([{"body": "w5"}])
    check_columns("sft", rows, SimpleNamespace(dataset_text_field="body"), "file")


def test_a_hole_and_no_rows_are_refused():
    with pytest.raises(ValueError, match=r"file: row 2 has no 'completion'"):
        rows = Dataset.from_list([{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": None}])
        check_columns("sft", rows, PLAIN, "file")
    with pytest.raises(ValueError, match="file has no rows"):
        check_columns("sft", Dataset.from_dict({"text": []}), PLAIN, "file")


def test_conversations_need_a_chat_template():
    chat = [{"role": "user", "content": "w5"}]
    rows = Dataset.from_list([{"messages": chat}])
    check_template(rows, make_tokenizer(), PLAIN, "model")
    bare = make_tokenizer(template=None)
    check_template(rows, bare, SimpleNamespace(chat_template_path="x.jinja"), "model")
    check_template(Dataset.from_list(ROWS), bare, PLAIN, "model")
    for bad in (rows, Dataset.from_list([{"prompt": chat, "chosen": chat, "rejected": chat}])):
        with pytest.raises(ValueError, match=r"model has no chat template .*--chat_template_path"):
            check_template(bad, bare, SimpleNamespace(chat_template_path=None), "model")
