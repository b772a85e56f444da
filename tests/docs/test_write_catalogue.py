"""The catalogue is what the parts say of themselves."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import moe_peft
from moe_peft import extend
from moe_peft.cli.shipped import names_of
from moe_peft.methods import METHODS
from tests.docs.pages import DOCS, ROOT
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


PACKAGE = Path(moe_peft.__file__).parent
ARXIV = re.compile(r"\b\d{4}\.\d{5}\b")
# Rooms whose files are what a row names: parts and tools, one a file.
ROOMS = ("routers", "experts", "losses", "tools", "integrations")


def homes(paper: dict) -> set[Path]:
    """The files of what the table names of a paper."""
    found = set()
    for name in paper["names"]:
        axis, _, own = name.rpartition(":")
        if axis in ("page", "preset"):
            continue
        thing = REGISTRIES[axis][own] if axis else resolve(name)
        found.add(Path(inspect.getfile(thing if inspect.ismodule(thing) else inspect.unwrap(thing))))
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_part_or_tool_of_a_paper_is_what_the_table_says_became_of_it(room):
    """A file that cites a paper has something of it, so that the paper is built and the row names what is there."""
    for path in sorted((PACKAGE / room).rglob("*.py")):
        cited = {*ARXIV.findall(path.read_text())}
        for paper in PAPERS:
            if paper["arxiv"] in cited and paper["kind"] != "method":
                where = f"papers.yaml, {paper['number']}: {path.relative_to(PACKAGE)} has something of it, but"
                assert paper["kind"] not in ("not built", "no meaning"), f"{where} the kind is {paper['kind']!r}"
                assert path in homes(paper), f"{where} no name of the row is from there: {paper['names']}"


def test_every_number_of_an_arxiv_paper_has_a_title_in_a_table():
    titles = {**WRITER.sources(), **{paper["arxiv"]: paper["paper"] for paper in PAPERS if paper["arxiv"]}}
    folders = ("moe_peft", "configs", "docs", "train", "examples", "benchmarks")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")] + [*ROOT.glob("*.md")]
    texts = {path: path.read_text() for path in files if path.suffix in (".py", ".yaml", ".md")}
    for path, text in texts.items():
        unknown = {*ARXIV.findall(text)} - titles.keys()
        assert not unknown, f"{path.relative_to(ROOT)}: {unknown} stands in neither papers.yaml nor sources.yaml"
    own = ("papers.yaml", "sources.yaml", "catalogue.md")
    cited = {number for path, text in texts.items() if path.name not in own for number in ARXIV.findall(text)}
    assert WRITER.sources().keys() <= cited, "sources.yaml: nobody cites some of them"
