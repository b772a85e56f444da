"""What pyproject.toml cannot say: scripts and configurations inside the package, and a README for package indexes."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
# Folders at the top of the repository, which an installed package has inside: moe_peft/train and moe_peft/configs.
INSIDE = {"moe_peft.train": "train", "moe_peft.configs": "configs"}
# A link or a picture whose target is no address.
RELATIVE = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:)([^)\s]+)\)")


def for_index(readme: str, repository: str | None) -> str:
    """README.md as a package index shows it, which has neither files beside it nor names of its headings.

    Args:
        readme: The text.
        repository: Address of the repository, to which links then lead; None leaves the words of a link, with the path
            of the file where they do not name it, and takes pictures out.
    """

    def absolute(found: re.Match[str]) -> str:
        picture, text, path = found.groups()
        if path.startswith("#"):
            return text
        if repository:
            return f"{picture}[{text}]({repository.rstrip('/')}/{'raw' if picture else 'blob'}/main/{path})"
        if picture:
            return ""
        return text if path.rstrip("/") in text else f"{text} (`{path}`)"

    return RELATIVE.sub(absolute, readme)


def repository_url(pyproject: str) -> str | None:
    """The address under `Repository` in pyproject.toml, where there is one.

    Args:
        pyproject: Its text.
    """
    found = re.search(r'^Repository *= *"([^"]+)"', pyproject, re.MULTILINE)
    return found.group(1) if found else None


def main() -> None:
    """Hand setuptools what it asks for."""
    pyproject, readme = ((HERE / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "README.md"))
    setup(
        packages=[*find_packages(include=["moe_peft*"]), *INSIDE],
        package_dir=INSIDE,
        long_description=for_index(readme, repository_url(pyproject)),
        long_description_content_type="text/markdown",
    )


# setuptools runs the file under this name too.
if __name__ == "__main__":
    main()
