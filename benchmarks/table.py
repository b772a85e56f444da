"""Writes the tables of measurements into the pages that show them, from the files under benchmarks/results.

    python benchmarks/table.py

A page says where a table goes, with `<!-- results: NAME -->` before it and `<!-- end of results -->` after it; NAME is
that of a file without `.json`, or "targets" for what is aimed at beside what those files hold of it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from targets import targets

ROOT = Path(__file__).parents[1]
PAGES, RESULTS = [ROOT / "docs" / name for name in ("performance.md", "tools.md")], ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end of results -->)", re.DOTALL)
# Figures of a row, as a page shows them.
FIGURES = {
    "ratio": ("ratio", "{:.2f}"),
    "spread": ("quartiles", "{0[0]:.2f} to {0[1]:.2f}"),
    "increment": ("of what adapters add", "{:.2f}"),
    "stock_over_this": ("stock over this", "{:.1f}"),
    "saved_beyond_attention": ("bytes saved beyond attention's", "{:,}"),
    "saved_bytes": ("bytes saved", "{:,}"),
    "gradient_bytes": ("bytes of gradients", "{:,}"),
    "peak_mib": ("MiB of peak", "{:.0f}"),
    "mixture_s": ("mixture, s", "{:.4f}"),
    "lora_s": ("LoRA, s", "{:.4f}"),
    "telemetry_us": ("telemetry, us a place", "{:.0f}"),
}
HIDDEN = ("median_s",)


def table(name: str, results: Path = RESULTS) -> str:
    """The table of one file, and below it what was run where.

    Args:
        name: Of the file, without its ending.
        results: Folder that holds it.
    """
    record = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = record["rows"]
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in HIDDEN]
    labels = [key for key in keys if key not in FIGURES]
    figures = [key for key in FIGURES if key in keys]
    # What differs between rows comes first; what is the same for all is said once.
    same = {key: rows[0].get(key) for key in labels if key != "over" and len({str(row.get(key)) for row in rows}) == 1}
    shown = [key for key in labels if key not in same]
    lines = [
        f"{record['title']}{''.join(f', {key} {value}' for key, value in same.items())}.",
        "",
        f"| {' | '.join([*shown, *(FIGURES[key][0] for key in figures)])} |",
        "|" + "---|" * (len(shown) + len(figures)),
    ]
    for row in rows:
        cells = [_text(row.get(key)) for key in shown]
        cells += ["" if row.get(key) is None else FIGURES[key][1].format(row[key]) for key in figures]
        lines.append(f"| {' | '.join(cells)} |")
    versions = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
    threads = f"{record['threads']} thread{'s' if record['threads'] > 1 else ''}"
    return "\n".join([*lines, "", f"`{record['command']}`; {record['machine']}, {threads}; {versions}.", ""])


def render(page: str, results: Path = RESULTS) -> str:
    """A page with its tables written anew.

    Args:
        page: Its text.
        results: Folder of the files.
    """

    def written(block: re.Match[str]) -> str:
        text = targets(results) if block[2] == "targets" else table(block[2], results)
        return f"{block[1]}\n{text}\n{block[3]}"

    return BLOCK.sub(written, page)


def _text(value: object) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")
