"""The source distribution holds what its tests, programs and pages need."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Files of the version control alone.
LEFT_OUT = {".gitignore"}


def test_the_source_distribution_is_the_repository(tmp_path):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a clone, so nothing says which files belong to it")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path / 'dist')!r})"
    source = tmp_path / "source"
    for name in listed.stdout.split():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    made = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-2000:]
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        packed = {name.partition("/")[2] for name in file.getnames()}
    assert not [name for name in listed.stdout.split() if name not in packed | LEFT_OUT and (ROOT / name).is_file()]
    assert not [name for name in packed if "__pycache__" in name]
