"""Data as people have it: every kind of file, columns checked, and each mistake named before a model is loaded."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pandas
import pytest
from data import COLUMNS, EXAMPLES, DataArguments, check_columns, check_template, load_data, splits
from datasets import Dataset
from trl import DatasetMixtureConfig

from tests.train.tiny_run import make_tokenizer

ROWS = [{"text": f"w{i + 4} w5"} for i in range(10)]
PLAIN = SimpleNamespace()


def load(*names, size=None, **fields):
    given = DatasetMixtureConfig(test_split_size=size)
    return load_data(DataArguments(dataset_name=[str(name) for name in names], **fields), given)


def write(folder, kind, rows=ROWS, name="rows"):
    path = folder / f"{name}.{kind}"
    if kind in ("jsonl", "ndjson"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "parquet":
        pandas.DataFrame(rows).to_parquet(path)
    else:
        pandas.DataFrame(rows).to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "csv", "tsv", "parquet"])
def test_every_kind_of_file_is_read_alone_and_in_a_folder(kind, tmp_path):
    path = write(tmp_path, kind)
    assert load(path)["train"].to_list() == ROWS
    if kind not in ("ndjson",):
        assert load(tmp_path)["train"].to_list() == ROWS


def test_several_files_are_joined_and_must_be_of_one_kind(tmp_path):
    paths = [write(tmp_path, "jsonl", ROWS[:4], "a"), write(tmp_path, "jsonl", ROWS[4:], "b")]
    assert load(*paths)["train"].to_list() == ROWS
    with pytest.raises(ValueError, match=r"files of several kinds \(csv, json\)"):
        load(paths[0], write(tmp_path, "csv"))


@pytest.mark.parametrize(("size", "held"), [(0.3, 3), (4, 4)])
def test_rows_of_a_file_are_held_out_for_evaluation(size, held, tmp_path):
    train, test = splits(load(write(tmp_path, "jsonl"), size=size), DataArguments(), evaluates=True)
    assert (len(train), len(test)) == (10 - held, held)
    assert sorted(row["text"] for row in [*train, *test]) == sorted(row["text"] for row in ROWS)


@pytest.mark.parametrize("size", [0.0, 10, 1e-9, 0.999])
def test_a_size_that_leaves_a_side_empty_is_refused(size, tmp_path):
    with pytest.raises(ValueError, match=r"--test_split_size .* of 10 rows out"):
        load(write(tmp_path, "jsonl"), size=size)


def test_a_split_that_is_missing_says_how_to_get_one(tmp_path):
    with pytest.raises(ValueError, match=r"--dataset_test_split test: .*--test_split_size 0.1"):
        splits(load(write(tmp_path, "jsonl")), DataArguments(), evaluates=True)


BROKEN = {
    "a line that is cut": ('{"text": "a"}\n{"text": "b"}\n{"text": "c\n', "line 3 is no JSON"),
    "no object": ('{"text": "a"}\n[1, 2]\n', r"line 2 holds \[1, 2\], not an object"),
    "another kind": ('{"text": "a"}\n\n{"text": ["b"]}\n', "line 3: 'text' is a list, but text in line 1"),
    "nothing": ("", "is empty: there is nothing to train on"),
    "blank lines": ("\n \n", "is empty: there is nothing to train on"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_line_is_named_with_its_number(case, tmp_path):
    text, message = BROKEN[case]
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(ValueError, match=rf"rows\.jsonl.*{message}") as error:
        load(tmp_path / "rows.jsonl")
    assert "\n" not in str(error.value)


def test_a_file_of_another_encoding_a_broken_csv_and_a_broken_parquet_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"text": "é"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.jsonl is not in UTF-8"):
        load(tmp_path / "a.jsonl")
    (tmp_path / "b.csv").write_text("text,other\nx,y\nx,y,z\n")
    with pytest.raises(ValueError, match=r"b\.csv, line 3 has 3 fields, but the header names 2"):
        load(tmp_path / "b.csv")
    (tmp_path / "c.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"c\.parquet cannot be read"):
        load(tmp_path / "c.parquet")


@pytest.mark.parametrize("name", ["nowhere.jsonl", "./nowhere", "/nowhere/at/all", "rows.xlsx"])
def test_a_path_that_is_not_there_or_of_another_kind_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.xlsx").write_text("x")
    with pytest.raises(ValueError, match=r"--dataset_name .*Kinds of files: \.csv, \.json"):
        load(name)


def test_an_empty_folder_and_both_sources_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no file of a kind that is read"):
        load(tmp_path)
    for given in (DataArguments(), DataArguments(dataset_name=["x"])):
        mixture = (
            DatasetMixtureConfig() if given.dataset_name is None else DatasetMixtureConfig(datasets=[{"path": "x"}])
        )
        with pytest.raises(ValueError, match="not both"):
            load_data(given, mixture)


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
