"""The package is of every declared Python: checked on this one, and on those that are installed beside it."""

from __future__ import annotations

import ast
import subprocess
import sys
import sysconfig

import pytest

from tests.pythons.run import ROOT, VERSIONS, interpreter
from tests.pythons.without_torch import annotations, evaluates, standard_names

SCRIPT = ROOT / "tests" / "pythons" / "without_torch.py"


@pytest.mark.parametrize("release", ["this", *VERSIONS])
def test_files_annotations_and_the_enum_are_fine(release):
    python = sys.executable if release == "this" else interpreter(release)
    if python is None:
        pytest.skip(f"Python {release} is not installed")
    command = [python, str(SCRIPT), sysconfig.get_path("purelib")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_check_sees_what_an_interpreter_does_not_have():
    for source in ("from typing import NoSuchName", "import enum.no_such_module"):
        with pytest.raises((ImportError, AttributeError)):
            standard_names(ast.parse(source))
    tree = ast.parse("from typing import ClassVar\nclass A:\n    a: ClassVar[int] = 1\n    b: int[str] = 2")
    names = standard_names(tree)
    assert [evaluates(text, names) for _, _, text in annotations(tree)] == [True, False]
