"""Files and modules that a command line names are imported once, found again by their names, or refused."""

from __future__ import annotations

import sys

import pytest

from moe_peft.cli.own_parts import import_parts, named_imports, taken_out

WORDS = ["--config", "run", "--moe_import", "a.py", "b", "--moe_r", "4", "--moe-import=c.py"]


@pytest.fixture(autouse=True)
def _as_before():
    paths, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = paths
    for name in set(sys.modules) - modules:
        if name.startswith("own_parts_of_"):
            del sys.modules[name]


def test_the_flag_takes_several_values_and_may_be_repeated():
    assert named_imports(WORDS) == ["a.py", "b", "c.py"]
    assert named_imports(["--moe_r", "4"]) == []
    with pytest.raises(ValueError, match="--moe_import needs a file"):
        named_imports(["--moe_import", "--moe_r", "4"])


def test_a_parser_that_does_not_know_the_flag_gets_the_other_words():
    words = ["--moe_import", "a.py", "folder", "--all", "--moe-import=b.py", "--moe_import", "c", "more"]
    assert taken_out(words) == (["a.py", "b.py", "c"], ["folder", "--all", "more"])


def test_files_and_modules_are_imported_and_have_their_names(tmp_path, monkeypatch):
    (tmp_path / "own_parts_of_a.py").write_text("VALUE = 1\n")
    (tmp_path / "own_parts_of_b.py").write_text("VALUE = 2\n")
    monkeypatch.chdir(tmp_path)
    import_parts(["own_parts_of_a.py", "own_parts_of_b", str(tmp_path / "own_parts_of_a.py")])
    assert [sys.modules[f"own_parts_of_{name}"].VALUE for name in "ab"] == [1, 2]


def test_what_is_not_there_or_called_like_another_module_is_refused(tmp_path):
    path = tmp_path / "json.py"
    path.write_text("")
    for name, message in (
        (str(path), "another module is called 'json'"),
        (str(tmp_path / "none.py"), "there is no such file"),
        ("no.such.module", "there is no such module"),
    ):
        with pytest.raises(ValueError, match=f"--moe_import .*{message}"):
            import_parts([name])


def test_an_error_in_the_file_is_its_own(tmp_path):
    (tmp_path / "own_parts_of_c.py").write_text("1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        import_parts([str(tmp_path / "own_parts_of_c.py")])
