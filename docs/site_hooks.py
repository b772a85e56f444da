"""What the site needs beyond its pages: a place for every page, and links to other files of the repository.

On a page, `[train/README.md](../train/README.md)` is right where the repository is browsed. The site holds the pages
alone, so there such a link becomes the file's name, and a link again where mkdocs.yml has a `repo_url`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+)([^)\s]*)\)")


def on_config(config: Any) -> Any:
    """Give pages that the menu of mkdocs.yml does not name a place at its end; called by mkdocs before it builds.

    Args:
        config: What mkdocs.yml says.
    """
    folder = Path(config.docs_dir)
    named = set(re.findall(r"[\w/-]+\.md", str(config.nav)))
    others = sorted({str(page.relative_to(folder)) for page in folder.rglob("*.md")} - named)
    if others:
        config.nav.append({"More": others})
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, **kwargs: Any) -> str:
    """Replace links that leave the folder of the pages; called by mkdocs for every page.

    Args:
        markdown: Text of a page.
        page: The page.
        config: What mkdocs.yml says.
        **kwargs: What else mkdocs gives.
    """
    depth = page.file.src_uri.count("/")
    return LINK.sub(lambda found: outside(found, depth, config.repo_url), markdown)


def outside(found: re.Match[str], depth: int, repo_url: str | None) -> str:
    """Text in the place of one link.

    Args:
        found: Where `LINK` matches.
        depth: Folders between the page and the top of the pages.
        repo_url: Address of the repository, where there is one.
    """
    text, ups, path = found.groups()
    if ups.count("..") <= depth:
        return found.group()
    if repo_url:
        return f"[{text}]({repo_url.rstrip('/')}/blob/main/{path})"
    return text if path.rstrip("/") in text else f"{text} (`{path}`)"
