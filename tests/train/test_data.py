"""Data as people have it: every kind of file, alone, joined and in folders, and rows held out of them."""

from __future__ import annotations

import json

import pandas
import pytest
from data import DataArguments, load_data, splits
from trl import DatasetMixtureConfig

ROWS = [{"text": f"w{i + 4} w5"} for i in range(10)]


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
