"""The numbers on the page of benchmarks, and those of README, are those of the recorded runs."""

from __future__ import annotations

import json
import re

import pytest

from tests.docs.pages import DOCS, ROOT

PAGE = (DOCS / "benchmarks.md").read_text()
SECTIONS = PAGE.split("\n## ")[1:]


def ratios(section: str) -> tuple[str, list[float]]:
    """Command of a section, and the recorded ratios."""
    (name,) = re.findall(r"`(benchmarks/results/\w+\.json)`", section)
    found = json.loads((ROOT / name).read_text())
    return found["command"], list(found["ratios"].values())


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.splitlines()[0])
def test_every_ratio_was_recorded_by_the_command_that_stands_beside_it(section):
    command, recorded = ratios(section)
    assert any(
        f"python {command}".startswith(shown) for shown in re.findall(r"`(python benchmarks/[^`]*)`", section)
    ), command
    shown = [float(value) for value in re.findall(r"^\| [^|]* \| (\d+\.\d\d) \|", section, re.MULTILINE)]
    assert len(shown) >= 5
    for value in shown:
        assert any(abs(value - ratio) <= 0.0051 for ratio in recorded), (value, recorded)


def test_readme_has_numbers_of_the_page_alone():
    text = (ROOT / "README.md").read_text().split("\n## Speed\n")[1].split("\n## ")[0]
    shown = re.findall(r"\b\d\.\d\d\b", text)
    assert shown and all(f"| {value} |" in SECTIONS[0] for value in shown)
