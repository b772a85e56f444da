"""The built site in a browser: no error in its console, nothing missing, and every page in light and dark."""

from __future__ import annotations

import functools
import html
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.browser import browser, console, run
from tests.docs.pages import DOCS, PAGES, ROOT

# Loads the pages one after the other in a frame, and writes down what each looks like.
WATCH = """
const found = [], frame = document.querySelector('iframe');
async function visit(page) {
  await new Promise(done => { frame.onload = done; frame.src = page; });
  const own = frame.contentDocument;
  const links = [...own.querySelectorAll('nav a[href]')].map(a => new URL(a.href, own.baseURI).pathname.slice(1));
  found.push({ page, title: own.title, text: own.querySelector('article').innerText.length, links,
    scheme: own.body.getAttribute('data-md-color-scheme'), background: getComputedStyle(own.body).backgroundColor,
    broken: [...own.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src) });
}
(async () => {
  for (const page of PAGES) await visit(page);
  const node = document.createElement('pre');
  node.id = 'found'; node.textContent = JSON.stringify(found); document.body.append(node);
})();
"""


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder; its address, and what was asked for in vain."""
    missing: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def send_error(self, code, message=None, explain=None):
            missing.append(f"{code} {self.path}")
            super().send_error(code, message, explain)

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", missing
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def visited(site: Path, folder: Path, dark: bool) -> list[dict]:
    """What every page of a site looks like in the browser."""
    names = [str(page.relative_to(DOCS).with_suffix(".html")) for page in PAGES]
    script = f"const PAGES = {json.dumps(names)};{WATCH}"
    around = '<!doctype html><body><iframe style="width:1280px;height:900px"></iframe>'
    (site / "around.html").write_text(f"{around}<script>{script}</script></body>")
    # 0 is the dark one of the browser's preferred colours, 1 the light one.
    flags = ["--virtual-time-budget=60000", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    with served(site) as (address, missing):
        result = run(f"{address}/around.html", folder, *flags)
    found = re.search(r'<pre id="found">(.*?)</pre>', result.stdout, re.DOTALL)
    assert found, result.stderr[-2000:]
    assert not [name for name in missing if "favicon" not in name], missing
    assert not [line for line in console(result) if "rror" in line], console(result)
    return json.loads(html.unescape(found.group(1)))


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built as `make docs` does."""
    browser()
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site") / "built"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=280)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_page_is_whole_and_in_the_menu(dark, site, tmp_path):
    pages = visited(site, tmp_path, dark)
    assert len(pages) == len(PAGES) and all(page["text"] > 200 and page["title"] for page in pages)
    assert not [page["broken"] for page in pages if page["broken"]]
    assert {page["scheme"] for page in pages} == {"slate" if dark else "default"}
    (background,) = {page["background"] for page in pages}
    brightness = sum(map(int, re.findall(r"\d+", background)[:3])) / 3
    assert brightness < 80 if dark else brightness > 200
    reached = {link for page in pages if page["page"] == "index.html" for link in page["links"]}
    assert not {page["page"] for page in pages} - reached - {"index.html"}
    shutil.rmtree(tmp_path / "profile", ignore_errors=True)
