"""The page holds everything that it shows, loads nothing, takes no text for markup, and fits narrow windows."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from moe_peft.tools.report.page import page
from tests.browser import WIDTHS, look

SECTIONS = ["What to do", "Importance by layer and expert", "Load by layer and expert", "Entropy by layer", "Groups"]
SECTIONS += ["Over training", "Tokens in context", "Similarity of experts", "What the words mean"]


class Elements(HTMLParser):
    """The elements of a page with their attributes, and tags that are not closed in order."""

    VOID = ("meta", "br", "rect", "line", "polyline", "polygon", "circle")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_page_is_whole_and_loads_nothing(made):
    elements = Elements(page(made))
    assert elements.open == []
    tags = {tag for tag, _ in elements.found}
    assert not tags & {"script", "link", "img", "iframe", "object"}
    assert not any({"src", "href", "onload", "onclick"} & attrs.keys() for _, attrs in elements.found)
    assert "http" not in page(made).replace("http-equiv", "")
    policy = next(a["content"] for tag, a in elements.found if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_texts_are_never_taken_for_markup(made):
    written = page(made)
    assert "<b>poems" not in written and "&lt;b&gt;poems&lt;/b&gt;" in written
    assert "<h1>Routing of a &amp; b</h1>" in written


def test_every_figure_has_a_description_and_a_table_of_its_numbers(made):
    elements = Elements(page(made)).found
    figures = [attrs for tag, attrs in elements if tag == "svg"]
    assert len(figures) >= 8 and all(attrs["role"] == "img" and len(attrs["aria-label"]) > 20 for attrs in figures)
    assert sum(tag == "table" for tag, _ in elements) == len(figures)


def test_colors_of_both_themes_are_defined(made):
    style = re.search(r"<style>(.*?)</style>", page(made), re.DOTALL).group(1)
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    used = set(re.findall(r"var\((--\w+)\)", page(made)))
    assert used - {"--w", "--e", "--tone"} <= set(re.findall(r"(--\w+):", light))
    assert {"--bg", "--fg", "--card", "--c0", "--c8"} <= set(re.findall(r"(--\w+):", dark))


def test_in_a_browser_every_figure_has_data_and_nothing_overflows(made, tmp_path):
    path = made.save(tmp_path / "report", plots=False)
    seen = look(path, tmp_path)
    assert seen.console == []
    assert [window["width"] for window in seen.windows] == list(WIDTHS)
    for window in seen.windows:
        assert window["overflow"] == 0 and window["scripts"] == 0
        assert window["headings"] == SECTIONS
        assert len(window["figures"]) >= 8
        assert all(figure["marks"] and figure["shown"] for figure in window["figures"])
