"""Values of another form than a trainer reads are one line with their row, before a model is loaded."""

from __future__ import annotations

import json

import pytest
from data_checks import COLUMNS, EXAMPLES, check_columns
from data_values import check_values, fault_of
from datasets import Dataset
from sft import make_parser
from training import prepare_data

from tests.train.test_data_checks import PLAIN
from tests.train.tiny_run import make_base

ASK, ANSWER = {"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}
# Columns -> a row, and what is said of it.
WRONG = {
    "messages as text": ({"messages": "w5"}, "'messages' is 'w5', but must be a list of messages"),
    "no message": ({"messages": []}, r"'messages' is \[\], but must be a list of messages"),
    "texts as messages": ({"messages": ["w5"]}, "'messages' holds 'w5', but a message looks like"),
    "no content": ({"messages": [ASK, {"role": "assistant"}]}, "a message without content: {'role': 'assistant'}"),
    "content is null": ({"messages": [{**ASK, "content": None}]}, "a message without content"),
    "other keys": (
        {"messages": [{"from": "human", "value": "w5"}]},
        "without role and content.* Rename 'from' to 'role', 'value' to 'content', 'human' to 'user'",
    ),
    "a number": ({"text": 5}, "'text' is 5, which is no text"),
    "a mixture": (
        {"prompt": [ASK], "completion": "w6"},
        "'prompt' is a conversation, but 'completion' is 'w6'. Write all of prompt, completion as texts",
    ),
    "a label in words": ({"prompt": "w5", "completion": "w6", "label": "good"}, "'label' is 'good'. Write true"),
}
RIGHT = [
    {"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [{"name": "w"}]}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "w5"}]}]},
    {"prompt": [ASK], "completion": [ANSWER]},
    {"prompt": [ASK], "chosen": [ANSWER], "rejected": [ANSWER]},
    {"prompt": "w5", "completion": "", "label": 0},
]


@pytest.mark.parametrize("case", WRONG)
def test_a_value_of_another_form_is_named_with_the_right_one(case):
    row, message = WRONG[case]
    with pytest.raises(ValueError, match=f"file, row 1: .*{message}") as error:
        check_values(Dataset.from_list([row] * 3), list(row), "file")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("row", RIGHT, ids=str)
def test_what_trainers_take_is_no_fault(row):
    assert fault_of(row, list(row)) is None


@pytest.mark.parametrize("script", COLUMNS)
def test_the_example_of_a_script_has_no_fault(script):
    row = json.loads(EXAMPLES[script])
    check_values(Dataset.from_list([row]), list(row), "file")


def test_every_row_is_looked_at_and_a_prompt_beside_pairs_too():
    rows = [{"messages": [ASK]}] * 1500 + [{"messages": [{**ASK, "content": None}]}]
    with pytest.raises(ValueError, match=r"file, row 1501: .* without content"):
        check_columns("sft", Dataset.from_list(rows), PLAIN, "file")
    pair = {"chosen": [ANSWER], "rejected": [ANSWER], "prompt": "w5"}
    with pytest.raises(ValueError, match="'chosen' is a conversation, but 'prompt' is 'w5'"):
        check_columns("dpo", Dataset.from_list([pair]), PLAIN, "file")
    check_columns("sft", Dataset.from_list([{"messages": [ASK], "prompt": "w5"}]), PLAIN, "file")


def test_the_first_row_of_streamed_ones_is_looked_at():
    rows = Dataset.from_list([{"text": 5}]).to_iterable_dataset()
    with pytest.raises(ValueError, match="'text' is 5"):
        check_values(rows, ["text"], "file")


def test_blank_rows_are_taken_beside_others_and_refused_alone():
    check_values(Dataset.from_list([{"text": " "}, {"text": "w5"}]), ["text"], "file")
    rows = Dataset.from_list([{"prompt": "w5", "completion": " "}] * 3)
    with pytest.raises(ValueError, match="file: every completion is blank"):
        check_values(rows, ["prompt", "completion"], "file")


def test_rows_to_evaluate_on_are_looked_at_too(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text('{"text": "w5"}\n')
    (tmp_path / "data/test.jsonl").write_text('{"text": ""}\n')
    words = ["--model_name_or_path", make_base(tmp_path / "base"), "--dataset_name", str(tmp_path / "data")]
    script_args, training_args, model_args, dataset_args, _ = make_parser().parse_args_and_config(
        [*words, "--use_cpu", "--output_dir", str(tmp_path / "out")]
    )
    with pytest.raises(ValueError, match="data, split test: every text is blank"):
        prepare_data("sft", model_args, training_args, (script_args, dataset_args), None, True)
