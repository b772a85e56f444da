"""The source distribution holds what its tests, programs and pages need."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.loading import load_file

ROOT = Path(__file__).parents[1]
# Files of the version control alone.
LEFT_OUT = {".gitignore"}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The source distribution of the files that the repository tracks."""
    folder = tmp_path_factory.mktemp("packaging")
    if not listed():
        pytest.skip("not a clone, so nothing says which files belong to it")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder / 'dist')!r})"
    source = folder / "source"
    for name in listed():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    made = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-2000:]
    (archive,) = (folder / "dist").glob("*.tar.gz")
    return archive


def listed() -> list[str]:
    found = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    return [name for name in found.stdout.split() if (ROOT / name).is_file()] if not found.returncode else []


def test_the_source_distribution_is_the_repository(archive):
    with tarfile.open(archive) as file:
        packed = {name.partition("/")[2] for name in file.getnames()}
    assert not [name for name in listed() if name not in packed | LEFT_OUT]
    assert not [name for name in packed if "__pycache__" in name]


def test_a_package_index_gets_a_readme_without_links_that_lead_nowhere_there():
    setup = load_file(ROOT / "setup.py")
    readme = (ROOT / "README.md").read_text()
    for repository in (None, "https://host/x/"):
        shown = setup.for_index(readme, repository)
        targets = re.findall(r"\]\(([^)\s]+)\)", shown)
        assert targets and all(target.startswith("https://") for target in targets)
        assert shown.count("\n") == readme.count("\n") and "```python" in shown
    text = "![one](a.svg) [Two](docs/b.md) [`c/d.md`](c/d.md) [E](#e) [f](https://f)"
    assert setup.for_index(text, None) == " Two (`docs/b.md`) `c/d.md` E [f](https://f)"
    linked = setup.for_index(text, "https://host/x/")
    assert linked.startswith("![one](https://host/x/raw/main/a.svg) [Two](https://host/x/blob/main/docs/b.md) ")


def test_the_address_of_the_repository_is_read_where_there_is_one():
    read = load_file(ROOT / "setup.py").repository_url
    assert read('[project.urls]\nRepository = "https://host/x"\n') == "https://host/x"
    assert read('[project]\nname = "x"\n') is None


@pytest.mark.slow
def test_tests_of_the_source_distribution_run_from_it(archive, tmp_path):
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    (root,) = tmp_path.iterdir()
    slice_of_it = ["tests/test_tables.py", "tests/test_options.py", "tests/routers/test_top_k.py"]
    assert all((root / name).is_file() for name in slice_of_it)
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *slice_of_it]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("twine") is None, reason="twine is not installed")
def test_an_index_would_take_the_source_distribution_and_its_readme(archive):
    command = [sys.executable, "-m", "twine", "check", "--strict", str(archive)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "PASSED" in done.stdout, done.stdout + done.stderr
