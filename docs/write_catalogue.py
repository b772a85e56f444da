"""Writes docs/catalogue.md: every registered part and every preset, from what the classes and files say of themselves.

Run from anywhere: `python docs/write_catalogue.py`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import yaml

from moe_peft.experts import EXPERTS
from moe_peft.losses import LOSSES
from moe_peft.part import ModulePart, Part
from moe_peft.routers import GATES, ROUTERS, SCORERS, SELECTORS

DOCS = Path(__file__).parent
PAGE = DOCS / "catalogue.md"
PRESETS = DOCS.parent / "configs" / "methods"
PAPERS = DOCS / "papers.yaml"
SOURCES = DOCS / "sources.yaml"
# What became of a paper, in the order of a count, as papers.yaml says it.
KINDS = ("method", "part", "tool", "advice", "not built", "no meaning")
AXES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "Scorers": ("`RoutedConfig(scorer=...)`: what scores the experts, z.", SCORERS),
    "Gates": ("`RoutedConfig(gate=...)`: how scores become probabilities, p.", GATES),
    "Selectors": ("`RoutedConfig(router=...)`: which experts a token uses, and with which weight w.", SELECTORS),
    "Whole routers": (
        "`RoutedConfig(router=...)` too, without a scorer, gate and selector of their own.",
        {name: router for name, router in ROUTERS.items() if name not in SELECTORS},
    ),
    "Experts": ("`RoutedConfig(experts=...)`: what a token may use.", EXPERTS),
    "Losses": ("`RoutedConfig(losses={name: weight})`: what a decision costs.", LOSSES),
}
HEAD = """# Catalogue

Every part that `RoutedConfig` takes by name, with its equation and source, its options, and what it says of itself;
the tests of the parts hold them to it. Options go into `router_args`, `experts_args`, and
`losses={"name": {"weight": 0.1, ...}}`. `python docs/write_catalogue.py` writes this page from the classes;
[extending](extending.md) adds to it, and [the measurements](performance.md#every-part) say what each part costs and
whether it does what its paper promises.

    z = scorer(x),   p = gate(z),   w = selector(z, p),   y = W0 x + experts(x, w)

In the equations T are tokens, E experts, K = k the experts a token uses, n valid tokens, and s = lora_alpha / r.
"""


def about(part: type[Part]) -> str:
    """What a part's file says above its code, and its class where the file is about several parts."""
    text = inspect.cleandoc(inspect.getmodule(part).__doc__ or "")
    own = inspect.cleandoc(part.__doc__ or "").split("\n\n")[0].split("; arguments as in")[0]
    return f"{text}\n\n{own.rstrip('.')}."


def options(part: type[Part]) -> str:
    """A table of a part's options; empty where it has none."""
    if not part.options:
        return ""
    rows = ["| option | default | must be | meaning |", "|---|---|---|---|"]
    rows += [f"| `{own.name}` | `{own.default!r}` | {own.expected} | {own.help} |" for own in part.options]
    return "\n".join(rows).replace("||", "\\|\\|") + "\n"


def flags(part: type[Part]) -> str:
    """What a part says of itself, in a few words."""
    said = []
    if part.fields:
        said.append("fields " + ", ".join(f"`{name}`" for name in part.fields))
    for word in ("gives", "needs", "context_needs"):
        names = sorted(getattr(part, word) - {"extra_scores"})
        if names:
            said.append(f"{word.replace('_', ' ')} " + ", ".join(f"`{name}`" for name in names))
    for promise, broken in (("causal", "not causal"), ("batch_invariant", "depends on other rows")):
        if not getattr(part, promise):
            said.append(broken)
    if not part.decode_stateless:
        said.append("decoding differs from the full forward")
    if not part.separable:
        said.append("no expert can be left out or added")
    if issubclass(part, ModulePart) and part.mergeable is True:
        said.append("merges where all else does")
    if getattr(part, "counts", False) is True or getattr(part, "adapts", False) is True:
        said.append("changes after each optimizer step (`moe_peft.after_step` in a plain loop)")
    return "; ".join(said)


def section(name: str, part: type[Part]) -> str:
    """The text of one part."""
    pieces = [f"### {name}\n", about(part) + "\n", options(part)]
    said = flags(part)
    return "\n".join([*(piece for piece in pieces if piece), *([f"{said[0].upper()}{said[1:]}.\n"] if said else [])])


def presets() -> str:
    """A table of the files for `--moe_config` that combine these parts."""
    rows = ["| `--moe_config` | what it is | parts |", "|---|---|---|"]
    for path in sorted(PRESETS.glob("routed_*.yaml")):
        text = path.read_text(encoding="utf-8")
        comment = " ".join(line[1:].strip() for line in text.splitlines() if line.startswith("#"))
        values = yaml.safe_load(text)
        named = {key: values.get(f"moe_{key}") for key in ("scorer", "gate", "router", "experts", "losses")}
        parts = [f"`{own if isinstance(own, str) else ', '.join(own)}`" for own in named.values() if own]
        rows.append(f"| `{path.stem}` | {comment} | {', '.join(parts)} |")
    return "\n".join(rows) + "\n"


def papers() -> list[dict[str, Any]]:
    """The papers of the file, in its order."""
    keys = ("number", "paper", "arxiv", "kind", "names", "text")
    return [dict(zip(keys, row, strict=True)) for row in yaml.safe_load(PAPERS.read_text(encoding="utf-8"))]


def paper_table() -> str:
    """Each paper with its source, what it became, and where that is."""
    rows = papers()
    counts = ", ".join(f"{sum(row['kind'] == kind for row in rows)} {kind}" for kind in KINDS)
    lines = [
        f"The {len(rows)} papers that the package was planned from, and what each became: {counts}.",
        "",
        '"No meaning" is said of an adapter. A link without a number looks the title up.',
        "",
        "| # | paper | became | names | in a sentence |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        title, known = row["paper"], row["arxiv"]
        search = f"https://arxiv.org/search/?searchtype=title&query={quote_plus(title)}"
        link = f"[{known}](https://arxiv.org/abs/{known})" if known else f"[search]({search})"
        names = ", ".join(_name(name) for name in row["names"])
        lines.append(f"| {row['number']} | {title}, {link} | {row['kind']} | {names} | {row['text']} |")
    return "\n".join(lines) + "\n"


def sources() -> dict[str, str]:
    """Title by arXiv id of what is cited beyond the papers of the table."""
    return dict(yaml.safe_load(SOURCES.read_text(encoding="utf-8")))


def source_table() -> str:
    """What is cited beyond the papers of the table."""
    lines = ["| arXiv | title |", "|---|---|"]
    lines += [f"| [{known}](https://arxiv.org/abs/{known}) | {title} |" for known, title in sources().items()]
    return "\n".join(lines) + "\n"


def _name(name: str) -> str:
    """A name of papers.yaml as the page shows it: with its axis, or as a link to a page."""
    axis, _, own = name.rpartition(":")
    return f"[{own}]({own})" if axis == "page" else f"{axis} `{own}`".strip()


def written() -> str:
    """The page."""
    pieces = [HEAD]
    for title, (text, registry) in AXES.items():
        pieces += [f"## {title}\n", f"{text}\n", *(section(name, part) for name, part in registry.items())]
    pieces += ["## Presets\n", "Methods of the literature as choices of parts:\n", presets()]
    pieces += ["## Papers\n", paper_table()]
    pieces += ["## Further sources\n", "What parts, presets and pages cite besides:\n", source_table()]
    lines = "\n".join(pieces).splitlines()
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in lines)) + "\n"


if __name__ == "__main__":
    PAGE.write_text(written(), encoding="utf-8")
