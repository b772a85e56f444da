"""The page of measurements shows what the recorded files hold, and every file names what repeats it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from moe_peft.extend import EXPERTS, GATES, LOSSES, ROUTERS, SCORERS

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def test_tables_are_those_of_the_recorded_files(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import table

    found = []
    for path in table.PAGES:
        page = path.read_text(encoding="utf-8")
        assert table.render(page) == page, "run python benchmarks/table.py"
        found += [block[1] for block in table.BLOCK.findall(page)]
    assert found and sorted(found) == sorted(["targets", *(path.stem for path in RESULTS)])


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_record_names_machine_versions_and_command_and_has_enough_rounds(path):
    record = json.loads(path.read_text())
    script = record["command"].split()[1]
    assert (ROOT / script).is_file() and record["machine"] and record["versions"]["torch"]
    assert record["command"].endswith(f"--output benchmarks/results/{path.name}") or "--output" in record["command"]
    assert record["command"].replace("python ", "", 1) in _bench()


def test_parts_that_cost_more_than_lora_say_why():
    rows = json.loads((ROOT / "benchmarks" / "results" / "catalogue.json").read_text())["rows"]
    assert len(rows) > 40 and all(bool(row["why"]) == (row["ratio"] > 1.3) for row in rows)


def test_every_registered_part_has_its_cost_in_the_table():
    rows = json.loads((ROOT / "benchmarks" / "results" / "catalogue.json").read_text())["rows"]
    timed = {(row["axis"], row["contestant"]) for row in rows}
    axes = {"router": ROUTERS, "scorer": SCORERS, "gate": GATES, "experts": EXPERTS, "loss": LOSSES}
    lacking = {(axis, name) for axis, registry in axes.items() for name in registry} - timed
    assert not lacking, f"run benchmarks/catalogue.py --update --only ... and benchmarks/table.py: {sorted(lacking)}"


def _bench() -> str:
    """The commands of `make bench`, continued lines joined."""
    return " ".join((ROOT / "Makefile").read_text().replace("\\\n", " ").split())


def test_readme_has_ratios_of_the_page_alone():
    text = (ROOT / "README.md").read_text().split("\n## Speed\n")[1].split("\n## ")[0]
    page = (ROOT / "docs" / "performance.md").read_text().split("\n## A training step of a dense model\n")[1]
    shown = re.findall(r"\b\d\.\d\d\b", text)
    assert shown and all(f"| {value} |" in page.split("\n## ")[0] for value in shown)
