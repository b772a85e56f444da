import json
import subprocess
import sys
from pathlib import Path

import pytest

TRAIN_DIR = Path(__file__).resolve().parents[1] / "train"
sys.path.insert(0, str(TRAIN_DIR))

import stdlib_docs  # noqa: E402
import stdlib_entries  # noqa: E402


@pytest.fixture(scope="module")
def entries():
    return stdlib_entries.collect_entries()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    stdlib_docs.write_splits(folder)
    return folder


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def names(rows):
    """Qualified names asked for, without the signature."""
    return {row["prompt"].split(" of ", 1)[1].split("(")[0].rstrip(":") for row in rows}


def test_entries_are_sorted_and_unique(entries):
    entry_names = [entry.name for entry in entries]
    assert entry_names == sorted(set(entry_names))
    sentences = [entry.sentence.lower() for entry in entries]
    assert len(set(sentences)) == len(sentences)


def test_bytes_do_not_depend_on_the_calling_process(data_dir, tmp_path):
    command = [sys.executable, str(TRAIN_DIR / "stdlib_docs.py"), "--output_dir", str(tmp_path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env={"PYTHONHASHSEED": "7"}).stdout
    for name in stdlib_docs.FILE_NAMES:
        assert (tmp_path / name).read_bytes() == (data_dir / name).read_bytes()
        assert name in printed


def test_thousands_of_pairs_in_both_groups(data_dir):
    rows = read_rows(data_dir / "train.jsonl")
    held_out = read_rows(data_dir / "test.jsonl")
    assert 4000 <= len(rows) + len(held_out) <= 12000
    assert 0.03 < len(held_out) / (len(rows) + len(held_out)) < 0.07
    for split in (rows, held_out):
        assert {row["task_type"] for row in split} == {stdlib_docs.TASK_GROUP, stdlib_docs.KNOWLEDGE_GROUP}


def test_rows_are_single_line_and_not_empty(data_dir):
    for file_name in ("train.jsonl", "test.jsonl"):
        for row in read_rows(data_dir / file_name):
            assert set(row) == {"prompt", "completion", "task_type"}
            assert row["prompt"].strip().endswith(":") and row["prompt"] == " ".join(row["prompt"].splitlines())
            assert row["completion"].startswith(" ") and row["completion"].strip()
            assert len(row["completion"].splitlines()) == 1


def test_no_name_in_both_splits(data_dir):
    train_names, test_names = (names(read_rows(data_dir / file)) for file in ("train.jsonl", "test.jsonl"))
    assert train_names and test_names and not train_names & test_names


def test_pretraining_text_leaves_out_held_out_docstrings(entries, data_dir):
    text = "\x00".join(row["text"] for row in read_rows(data_dir / "pretrain.jsonl"))
    for entry in entries:
        if stdlib_docs.is_held_out(entry.name):
            assert f"\x00{entry.name}{entry.signature}\n\n" not in text
            assert entry.doc not in text or len(entry.doc) < 60


def test_no_address_and_no_path_of_this_machine(data_dir):
    for file_name in ("train.jsonl", "test.jsonl"):
        text = (data_dir / file_name).read_text()
        assert " at 0x" not in text
        assert sys.prefix not in text and str(Path.home()) + "/" not in text


@pytest.mark.parametrize(
    ("doc", "sentence"),
    [
        ("Return x. Then more.", "Return x."),
        ("range(stop) -> range object\n\nReturn an object\nthat counts.", "Return an object that counts."),
        ("Use a word, e.g. this one, or\nthat.\n\nMore.", "Use a word, e.g. this one, or that."),
        ("No full stop\n\nMore.", "No full stop"),
        ("", ""),
    ],
)
def test_first_sentence(doc, sentence):
    assert stdlib_entries.first_sentence(doc) == sentence


def test_signature_hides_annotations_and_long_defaults(entries):
    def function(a: int, *, key=None, where=Path("/"), **options):
        pass

    signature = stdlib_entries.inspect.signature(function)
    assert stdlib_entries.signature_text(signature) == "(a, *, key=None, where=..., **options)"
    assert stdlib_entries.arguments_text(signature) == "required and optional"


def test_known_pairs(entries):
    by_name = {entry.name: entry for entry in entries}
    knowledge, task = stdlib_docs.instruction_pairs([by_name["math.asin"]])
    assert knowledge["prompt"] == "Summary of math.asin(x, /):"
    assert knowledge["completion"] == " Return the arc sine (measured in radians) of x."
    assert task == {
        "prompt": "Kind of math.asin(x, /):",
        "completion": " function, required arguments",
        "task_type": 0,
    }


def test_patched_standard_library_is_not_seen(entries, monkeypatch):
    monkeypatch.setattr("logging.Logger.shout", lambda self: None, raising=False)
    monkeypatch.setattr("string.capwords", None)
    assert stdlib_entries.collect_entries() == entries


@pytest.mark.parametrize(
    "name", ["this", "antigravity", "idlelib.run", "_io", "json.__main__", "unittest.test", "test"]
)
def test_noisy_modules_are_skipped(name):
    assert stdlib_entries._is_skipped(name)
