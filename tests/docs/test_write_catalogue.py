"""The catalogue is what the parts say of themselves."""

from __future__ import annotations

import re

import pytest

from moe_peft import extend
from moe_peft.cli.shipped import names_of
from moe_peft.methods import METHODS
from tests.docs.pages import DOCS
from tests.docs.test_names import resolve
from tests.loading import load_file

WRITER = load_file(DOCS / "write_catalogue.py")
PAGE = (DOCS / "catalogue.md").read_text()


def test_the_page_is_written_from_the_registries():
    assert WRITER.written() == PAGE, "run python docs/write_catalogue.py"


@pytest.mark.parametrize("axis", ["SCORERS", "GATES", "SELECTORS", "ROUTERS", "EXPERTS", "LOSSES"])
def test_every_registered_part_has_a_section_with_its_options(axis):
    for name, part in getattr(extend, axis).items():
        assert f"### {name}\n" in PAGE
        for option in part.options:
            assert f"| `{option.name}` | `{option.default!r}` |" in PAGE


def test_a_part_of_the_literature_names_its_paper():
    sections = re.split(r"^### ", PAGE.partition("## Presets")[0], flags=re.MULTILINE)[1:]
    without = {text.split("\n")[0] for text in sections if not re.search(r"\b\d{4}\.\d{5}\b", text)}
    # The paper of the last two has no number there.
    assert without <= {"linear", "softmax", "hybrid", "certainty_balance"}


REGISTRIES = {
    "scorer": extend.SCORERS,
    "gate": extend.GATES,
    "selector": extend.SELECTORS,
    "router": extend.ROUTERS,
    "experts": extend.EXPERTS,
    "loss": extend.LOSSES,
    "method": METHODS,
}
PAPERS = WRITER.papers()


def test_every_paper_is_there_once_with_what_it_became_and_why():
    numbers = [str(paper["number"]) for paper in PAPERS]
    assert numbers == [*map(str, range(1, 170)), *(f"S{n}" for n in range(1, 11))]
    for paper in PAPERS:
        assert paper["kind"] in WRITER.KINDS, paper
        assert paper["arxiv"] is None or re.fullmatch(r"\d{4}\.\d{4,5}", paper["arxiv"]), paper
        assert paper["text"].endswith(".") and bool(paper["names"]) == (
            paper["kind"] not in ("not built", "no meaning")
        )
    known = [paper["arxiv"] for paper in PAPERS if paper["arxiv"] and paper["number"] != "S3"]
    assert len(set(known)) == len(known)


def exists(name: str) -> bool:
    """Whether there is what a name of the table says."""
    axis, _, own = name.rpartition(":")
    if axis == "page":
        return (DOCS / own).is_file()
    if axis == "preset":
        return own in names_of("methods")
    return own in REGISTRIES[axis] if axis else resolve(own) is not None


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: str(paper["number"]))
def test_what_a_paper_became_is_there(paper):
    missing = [name for name in paper["names"] if not exists(name)]
    assert not missing, f"{paper['paper']}: {missing}"


def test_every_preset_of_a_paper_of_the_table_is_named_in_it():
    ids = {paper["arxiv"] for paper in PAPERS}
    named = {name for paper in PAPERS for name in paper["names"]}
    for name, path in names_of("methods").items():
        first = re.findall(r"arXiv (\d{4}\.\d{5})", path.read_text().splitlines()[0])
        if name.startswith("routed_") and ids & {*first}:
            assert f"preset:{name}" in named, f"papers.yaml does not say that {first} became the preset {name}"
