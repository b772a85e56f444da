"""The pages of the documentation: their files, links and programs."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# Documents outside of the site, which link into it.
OTHERS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "train/README.md"]
FENCED = re.compile(r"^( *)(```+)(\w*)[^\n]*\n(.*?)^\1\2$", re.DOTALL | re.MULTILINE)


def name_of(path: Path) -> str:
    return str(path.relative_to(DOCS if DOCS in path.parents else ROOT))


def programs(path: Path, language: str = "python") -> list[str]:
    """The blocks of a page in a language, in order."""
    return [text for _, _, found, text in FENCED.findall(path.read_text()) if found == language]


def prose(path: Path) -> str:
    """A page without its blocks."""
    return FENCED.sub("", path.read_text())


def anchor(heading: str) -> str:
    """What a heading's link ends in, as GitHub makes it."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    return {anchor(heading) for heading in re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)}


def links(path: Path) -> list[str]:
    """Targets of a page's links and pictures that lead to files of the repository or into the page itself."""
    targets = re.findall(r"\]\(<?([^)\s>]+)>?\)", prose(path)) + re.findall(r'(?:src|href)="([^"]+)"', prose(path))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]
