"""Fetches the test files of the installed peft release, and imports them as the package `peft_tests`."""

import importlib
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

CACHE = Path(__file__).parents[2] / ".cache" / "peft-sdist"
PACKAGE = "peft_tests"


def fetch() -> Path:
    """Download peft's source distribution once per version, and return the folder of its tests."""
    name = f"peft-{version('peft')}"
    tests = CACHE / name / "tests"
    if tests.is_dir():
        return tests
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        pip = [sys.executable, "-m", "pip", "download", f"peft=={version('peft')}", "--dest", folder]
        source_only = ["--no-binary", ":all:", "--no-deps", "--no-build-isolation", "--quiet"]
        done = subprocess.run([*pip, *source_only], capture_output=True, text=True)
        if done.returncode != 0:
            raise pytest.UsageError(f"The source distribution of {name} cannot be downloaded:\n{done.stderr}")
        with tarfile.open(Path(folder) / f"{name}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
        try:
            (Path(folder) / name).rename(CACHE / name)
        except OSError:
            # Another process was faster.
            if not tests.is_dir():
                raise
    return tests


def load(name: str) -> ModuleType:
    """Import one of peft's test modules, such as "test_config"."""
    if PACKAGE not in sys.modules:
        # The distribution has no tests/__init__.py, and "tests" is too common a name.
        pytest.register_assert_rewrite(PACKAGE)
        package = ModuleType(PACKAGE)
        package.__path__ = [str(fetch())]
        sys.modules[PACKAGE] = package
    missing = {name: stub for name, stub in STUBS.items() if find_spec(name) is None}
    for name_of_missing, build in missing.items():
        sys.modules[name_of_missing] = build()
    try:
        return importlib.import_module(f"{PACKAGE}.{name}")
    finally:
        for name_of_missing in missing:
            del sys.modules[name_of_missing]


def _diffusers() -> ModuleType:
    """peft's tests import one class and ask for the version, which no test here depends on."""
    stub = ModuleType("diffusers")
    stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    stub.__version__ = "0"
    return stub


def _parameterized() -> ModuleType:
    """Tests whose rows are written with it are about the targets of stock types; they are left out."""
    stub = ModuleType("parameterized")
    stub.parameterized = SimpleNamespace(expand=lambda *_, **__: lambda test: test)
    return stub


STUBS = {"diffusers": _diffusers, "parameterized": _parameterized}
