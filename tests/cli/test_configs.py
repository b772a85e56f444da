"""`moe-peft configs` lists what ships, and prints one."""

from __future__ import annotations

from moe_peft.cli import main
from moe_peft.cli.shipped import KINDS, names_of


def test_every_configuration_is_listed_with_a_word_about_it(capsys):
    assert main(["configs"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    for kind in KINDS:
        for name in names_of(kind):
            assert len(lines[name].split()) > 2, name


def test_a_name_that_is_not_there_is_answered_with_the_nearest(capsys):
    assert main(["configs", "sirra"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("moe-peft configs: sirra: there is no such file") and "Nearest names: sira" in printed


def test_one_is_printed_as_it_is(capsys):
    assert main(["configs", "methods/sira"]) == 0
    assert capsys.readouterr().out == names_of("methods")["sira"].read_text()
