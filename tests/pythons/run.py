"""Runs the package on other releases of Python: a subset of the tests where torch has a CPU build at hand.

Elsewhere the checks of `without_torch` alone: nothing here downloads a CUDA build. Builds come from pip's own
`find-links`, or from the index that TORCH_INDEX names.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]
VERSIONS = ("3.10", "3.12", "3.13")
TORCH = os.environ.get("TORCH", "torch==2.13.0")
SUBSET = [
    "tests/config",
    "tests/routers",
    "tests/experts",
    "tests/losses",
    "tests/ops",
    "tests/tuner/test_registration.py",
]
SUBSET += [
    "tests/methods/test_loramoe.py",
    "tests/methods/test_esft.py",
    "tests/contract",
    "tests/test_saved_adapters.py",
]


def interpreter(release: str) -> str | None:
    """Path of a Python of a release: on the path, or one of pyenv's; None where there is none."""
    found = shutil.which(f"python{release}")
    if found is not None and subprocess.run([found, "--version"], capture_output=True).returncode == 0:
        return found
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = sorted(root.glob(f"versions/{release}.*/bin/python"))
    return str(candidates[-1]) if candidates else None


def torch_source(python: str) -> list[str] | None:
    """Arguments with which pip finds a CPU build of torch for an interpreter; None where it finds none."""
    index = os.environ.get("TORCH_INDEX")
    options = ["--index-url", index] if index else ["--no-index"]
    command = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--dry-run",
        "--ignore-installed",
        "--no-deps",
        *options,
        TORCH,
    ]
    return options if subprocess.run(command, capture_output=True).returncode == 0 else None


def run_tests(release: str, python: str, source: list[str]) -> int:
    """Install the package into an environment of its own, and run the subset there."""
    folder = ROOT / f".venv-{release}"
    own = str(folder / "bin" / "python")
    commands = [
        [python, "-m", "venv", str(folder)],
        # torch's own requirements come with the package's, as its index may not have them.
        [own, "-m", "pip", "install", "--quiet", "--no-deps", *source, TORCH],
        [own, "-m", "pip", "install", "--quiet", "--editable", f"{ROOT}[train,bnb]", "pytest>=8", "setuptools"],
        [own, "-m", "pytest", "-q", "-p", "no:cacheprovider", *SUBSET],
    ]
    return next((result for result in (subprocess.run(own, cwd=ROOT).returncode for own in commands) if result), 0)


def main(releases: list[str]) -> int:
    """Run every release, and say of each what was run.

    Args:
        releases: Releases of Python, as "3.10".

    Returns:
        Exit status: 0 where nothing that was run failed.
    """
    failed = 0
    for release in releases:
        python = interpreter(release)
        if python is None:
            print(f"Python {release}: not installed, nothing was run")
            continue
        print(f"Python {release} ({python}), without torch:", flush=True)
        script = ROOT / "tests" / "pythons" / "without_torch.py"
        failed |= subprocess.run([python, str(script), sysconfig.get_path("purelib")]).returncode
        source = torch_source(python)
        if source is None:
            print(f"Python {release}: no CPU build of {TORCH} at hand (see TORCH_INDEX), so no test was run")
        else:
            failed |= run_tests(release, python, source)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(VERSIONS)))
