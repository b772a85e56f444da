"""The package seen from outside: its public names, and what importing it brings along."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import moe_peft
from moe_peft import extend, telemetry
from moe_peft.layers import LAYERS
from moe_peft.methods import METHODS
from moe_peft.ops import IMPLEMENTATIONS

PACKAGE = Path(moe_peft.__file__).parent
REGISTRIES = (extend.SCORERS, extend.GATES, extend.SELECTORS, extend.ROUTERS, extend.EXPERTS, extend.LOSSES)
# Files that hold the registries, and those of the parts themselves.
# Where types are written, shown to users, or made into files of other packages.
ABOVE_METHODS = ("methods", "__init__.py", "tools", "cli")
ROOMS_OF_PARTS = ("routers", "experts", "losses", "methods")


def test_dir_shows_the_public_names_only():
    assert dir(moe_peft) == sorted([*moe_peft.__all__, "__version__"])
    assert all(getattr(moe_peft, name) is not None for name in dir(moe_peft))


def test_importing_the_package_brings_along_neither_trainers_nor_quantizers():
    code = (
        "import sys, peft\n"
        "before = set(sys.modules)\n"
        "import moe_peft\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "heavy = new & {'trl', 'datasets', 'matplotlib', 'bitsandbytes', 'triton'}\n"
        "assert not heavy, heavy\n"
        "assert not any('quantizer' in name for name in set(sys.modules) - before)\n"
        "assert 'moe_peft.quantization.loading' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def texts_of(tree: ast.AST) -> list[str]:
    """The texts of a file but for its docstrings, which may tell where an idea is from."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef)
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, owners)]
    docs = {id(body[0].value) for body in bodies if body and isinstance(body[0], ast.Expr)}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docs]
    return [node.value for node in constants if isinstance(node.value, str)]


def names_of(tree: ast.AST) -> set[str]:
    """The names of variables, attributes and imports of a file."""
    found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    found |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return found | {alias.name for node in imports for alias in node.names}


def short(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def files_outside(*rooms: str) -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.relative_to(PACKAGE).parts[0] not in rooms]


@pytest.mark.parametrize("path", files_outside(*ABOVE_METHODS), ids=short)
def test_no_method_is_named_outside_of_its_room(path):
    tree, configs = ast.parse(path.read_text()), {config.__name__ for config in METHODS.values()}
    keys = {*METHODS, *(config.adapter_type for config in METHODS.values())}
    assert not names_of(tree) & configs
    assert not [text for text in texts_of(tree) if text in keys or any(name in text for name in configs)]


@pytest.mark.parametrize("path", files_outside(*ROOMS_OF_PARTS), ids=short)
def test_no_part_is_named_outside_of_its_file_and_registry(path):
    config_fields = {own.name for config in METHODS.values() for own in fields(config)}
    # What is called like a part without being one: kinds of places, ways to compute a sum, fields and statistics.
    others = {*LAYERS, *IMPLEMENTATIONS, *config_fields, *telemetry.__all__}
    parts = {name for registry in REGISTRIES for name in registry} - others
    assert parts and not [text for text in texts_of(ast.parse(path.read_text())) if text in parts]


@pytest.mark.parametrize("path", [path for path in files_outside() if path.name != "__init__.py"], ids=short)
def test_every_file_has_a_mirrored_test(path):
    own = path.relative_to(PACKAGE)
    assert (Path(__file__).parent / own.parent / f"test_{own.name}").exists()
