"""Looks at pages in a headless browser: what its console says, and how wide they are in narrow and wide windows."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = (360, 1280)
MEASURE = """
window.onload = () => setTimeout(() => {
  const out = [...document.querySelectorAll('iframe')].map(frame => {
    const page = frame.contentDocument, root = page.documentElement;
    return { width: frame.clientWidth, overflow: root.scrollWidth - root.clientWidth,
      figures: [...page.querySelectorAll('svg')].map(svg => ({ name: svg.getAttribute('aria-label'),
        marks: svg.querySelectorAll('rect,polyline,circle').length, shown: svg.getBoundingClientRect().width > 50 })),
      headings: [...page.querySelectorAll('h2')].map(own => own.textContent), scripts: page.scripts.length };
  });
  const node = document.createElement('pre');
  node.id = 'found'; node.textContent = JSON.stringify(out); document.body.append(node);
}, 200);
"""


@dataclass(frozen=True)
class Look:
    """What a page is like in windows of several widths, and what the console said."""

    windows: list[dict]
    console: list[str]


def browser() -> str:
    """The browser of this machine; the test is skipped where it has none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    return found


def run(url: str, folder: Path, *flags: str) -> subprocess.CompletedProcess:
    """Load a page, print its document, and let the console write to stderr."""
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=8000", "--window-size=1400,1000", *flags]
    return subprocess.run([*command, "--dump-dom", url], capture_output=True, text=True, timeout=400)


def console(result: subprocess.CompletedProcess) -> list[str]:
    """The lines of the console, of any level."""
    return [line for line in result.stderr.splitlines() if "CONSOLE" in line]


def look(page: Path, folder: Path) -> Look:
    """Load a page of one file in a frame of each width."""
    inner = html.escape(page.read_text(encoding="utf-8"), quote=True)
    frames = [f'<iframe style="width:{w}px;height:900px;border:0" srcdoc="{inner}"></iframe>' for w in WIDTHS]
    around = folder / "around.html"
    around.write_text(f"<!doctype html><body>{''.join(frames)}<script>{MEASURE}</script></body>", encoding="utf-8")
    result = run(around.as_uri(), folder)
    found = re.search(r'<pre id="found">(.*?)</pre>', result.stdout, re.DOTALL)
    assert found, result.stderr[-2000:]
    return Look(json.loads(html.unescape(found.group(1))), console(result))
