"""`moe-peft run` runs a module or a script as python would, with the adapter types registered."""

from __future__ import annotations

import sys

from moe_peft.cli import main

SCRIPT = """import sys, peft, beside
print(sys.argv[1:], __name__, beside.WORD, peft.PeftType.ROUTED in peft.PEFT_TYPE_TO_CONFIG_MAPPING)
raise SystemExit(int(sys.argv[1]))
"""


def test_a_script_gets_its_words_its_folder_and_the_adapter_types(tmp_path, capsys):
    (tmp_path / "tool.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("WORD = 'here'\n")
    before = sys.argv, list(sys.path)
    assert main(["run", str(tmp_path / "tool.py"), "3", "--flag"]) == 3
    assert capsys.readouterr().out == "['3', '--flag'] __main__ here True\n"
    assert (sys.argv, sys.path) == before


def test_a_module_is_run_from_the_working_directory(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_tool_of_ones_own.py").write_text("import sys\nprint(__name__, sys.argv[1:])\n")
    assert main(["run", "-m", "a_tool_of_ones_own", "--model", "x"]) == 0
    assert capsys.readouterr().out == "__main__ ['--model', 'x']\n"


def test_an_error_of_the_tool_keeps_its_traceback(tmp_path, capsys):
    (tmp_path / "tool.py").write_text("raise ValueError('of the tool')\n")
    assert main(["run", str(tmp_path / "tool.py")]) == 1
    printed = capsys.readouterr().err
    assert "Traceback" in printed and "ValueError: of the tool" in printed


def test_what_is_not_there_is_one_line(capsys):
    assert main(["run", "nowhere.py"]) == 1
    assert "there is no such script. For an installed tool write -m" in capsys.readouterr().err
    assert main(["run", "-m", "no_module_of_this_name.at_all"]) == 1
    assert "there is no module of that name" in capsys.readouterr().err
