"""A broken file is named with its line, in one line, before a model is loaded."""

from __future__ import annotations

import pytest

from tests.train.test_data import load

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
