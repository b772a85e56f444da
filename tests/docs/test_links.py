"""Every link of the documentation leads to a file and a heading that exist, and every page has a place in the menu."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from tests.docs.pages import DOCS, OTHERS, PAGES, ROOT, anchor, anchors, links, name_of
from tests.loading import load_file


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=name_of)
def test_links_lead_to_files_and_headings_that_exist(page):
    for target in links(page):
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists() and (file == ROOT or ROOT in file.parents), target
        assert not heading or heading in anchors(file), f"{target}: {sorted(anchors(file))}"


def test_a_heading_links_as_on_github():
    assert anchor("What is `r`? [LoRA](x.md), 4-bit & more") == "what-is-r-lora-4-bit--more"


def test_the_menu_of_the_site_names_pages_that_exist_once_each():
    menu = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    named = re.findall(r"([\w/-]+\.md)$", menu, re.MULTILINE)
    assert len(named) == len(set(named)) and set(named) <= {name_of(page) for page in PAGES}


def test_a_page_that_the_menu_does_not_name_has_a_place_at_its_end(tmp_path):
    for name in ("a.md", "below/b.md", "c.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    config = SimpleNamespace(docs_dir=str(tmp_path), nav=[{"Home": "a.md"}, {"Section": [{"C": "c.md"}]}])
    add = load_file(DOCS / "site_hooks.py").on_config
    assert add(config).nav[-1] == {"More": ["below/b.md"]}
    assert add(config).nav[-1] == {"More": ["below/b.md"]} and len(config.nav) == 3


def test_links_out_of_the_pages_become_names_on_the_site_or_links_to_the_repository():
    change = load_file(DOCS / "site_hooks.py").on_page_markdown
    top, below = (SimpleNamespace(file=SimpleNamespace(src_uri=name)) for name in ("a.md", "methods/a.md"))
    alone, known = SimpleNamespace(repo_url=None), SimpleNamespace(repo_url="https://host/x/")
    assert change("[the scripts](../train/README.md)", top, alone) == "the scripts (`train/README.md`)"
    assert change("[`train/README.md`](../train/README.md)", top, alone) == "`train/README.md`"
    assert change("[a](../train)", top, known) == "[a](https://host/x/blob/main/train)"
    assert change("[a](../b.md)", below, alone) == "[a](../b.md)"
    assert change("[a](../../train)", below, alone) == "a (`train`)"
