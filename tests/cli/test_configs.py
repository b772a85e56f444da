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


def test_one_is_printed_as_it_is(capsys):
    assert main(["configs", "methods/sira"]) == 0
    assert capsys.readouterr().out == names_of("methods")["sira"].read_text()
