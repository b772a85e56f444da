"""The package seen from outside: its public names, and what importing it brings along."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import moe_peft
from moe_peft import extend, telemetry
from moe_peft.experts.bottleneck import ACTIVATIONS
from moe_peft.layers import LAYERS
from moe_peft.methods import METHODS
from moe_peft.ops import IMPLEMENTATIONS

PACKAGE = Path(moe_peft.__file__).parent
REGISTRIES = (extend.SCORERS, extend.GATES, extend.SELECTORS, extend.ROUTERS, extend.EXPERTS, extend.LOSSES)
# Files that hold the registries, and those of the parts themselves.
# Where types are written, shown to users, or made into files of other packages.
ABOVE_METHODS = ("methods", "__init__.py", "tools", "cli")
# What reads or writes files of other packages, in forms that are called after the method that they hold.
FORMS = re.compile(r"tools/(\w+_files|export_lora|__init__)\.py|cli/(export|importing)\.py")
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
    """Every name that a file makes, takes, reads or imports."""
    found = set()
    for node in ast.walk(tree):
        found |= {value for value in (getattr(node, key, None) for key in ("id", "attr", "name", "arg")) if value}
        if isinstance(node, ast.ImportFrom):
            found |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
    return {name for name in found if isinstance(name, str)}


def words_of(text: str) -> set[str]:
    """The words of a text, or of an identifier in either style, in lower case; those with an underscore as one too."""
    whole = re.findall(r"[A-Za-z0-9_]+", text)
    parts = [part for word in whole for part in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", word)]
    return {word.lower() for word in (*whole, *parts)}


def files(*without: str) -> dict[str, ast.AST]:
    """Files of the package outside of some rooms, parsed."""
    paths = [path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py"))]
    return {str(path): ast.parse((PACKAGE / path).read_text()) for path in paths if path.parts[0] not in without}


def part_names() -> set[str]:
    return {name for registry in REGISTRIES for name in registry}


def like_parts() -> set[str]:
    """What is called like a part without being one: places, ways to compute a sum, activations, fields, statistics."""
    own = {own.name for config in METHODS.values() for own in fields(config)}
    return {*LAYERS, *IMPLEMENTATIONS, *ACTIVATIONS, *own, *telemetry.__all__}


def test_no_method_is_named_outside_of_its_room():
    configs = {config.__name__ for config in METHODS.values()}
    keys = {*METHODS, *(config.adapter_type for config in METHODS.values())}
    # What the whole family is called, and a computation that stock adapters are given too.
    words = {key.lower() for key in keys} - {"routed", "expert_lora"}
    for path, tree in files(*ABOVE_METHODS).items():
        found = [name for name in names_of(tree) if name in configs or words_of(name) & words]
        found += [text for text in texts_of(tree) if text in keys or words_of(text) & words]
        found += [text for text in texts_of(tree) if any(name in text for name in configs)]
        assert not found, f"{path} names a method: {found}. Let the configuration say what is asked there."


def test_no_part_is_named_outside_of_its_room():
    parts, classes = part_names() - like_parts(), {part.__name__ for own in REGISTRIES for part in own.values()}
    quoted = re.compile("|".join(rf"['\"]{name}['\"]" for name in sorted(parts)))
    assert parts
    for path, tree in files(*ROOMS_OF_PARTS).items():
        found = [text for text in texts_of(tree) if text in parts or quoted.search(text)]
        found += [name for name in names_of(tree) if name in classes and path != "extend.py"]
        assert not found, f"{path} names a part: {found}. Ask the part's class what it gives, needs or promises."


def test_scripts_commands_and_tools_ask_the_registries_for_methods_and_parts():
    # Tools that make adapters make them of the general type, whose fields name the parts.
    configs = {config.__name__ for config in METHODS.values()} - {"RoutedConfig"}
    keys = {*METHODS, *(config.adapter_type for config in METHODS.values())}
    words = {key.lower() for key in keys} - {"routed", "expert_lora"}
    parts, classes = part_names() - like_parts(), {part.__name__ for own in REGISTRIES for part in own.values()}
    trees = {f"train/{path.name}": ast.parse(path.read_text()) for path in (PACKAGE.parent / "train").glob("*.py")}
    trees |= {path: tree for path, tree in files().items() if path.startswith(("cli/", "tools/"))}
    for path, tree in trees.items():
        if not FORMS.fullmatch(path):
            found = [name for name in names_of(tree) if name in configs | classes or words_of(name) & words]
            found += [text for text in texts_of(tree) if text in keys | parts]
            if path.startswith("train/"):
                found += [text for text in texts_of(tree) if words_of(text) & words]
            assert not found, f"{path} names a method or a part: {found}. Ask the registries."


def test_no_part_is_named_in_the_file_of_another():
    # Words of what parts give to each other may be those of a part.
    words = {word for own in REGISTRIES for part in own.values() for word in part.gives}
    parts = part_names() - like_parts() - words
    registries = {"routers/registry.py", "experts/__init__.py", "losses/__init__.py"}
    for path, tree in files().items():
        if path.partition("/")[0] in {"routers", "experts", "losses"} and path not in registries:
            found = [text for text in texts_of(tree) if text in parts]
            assert not found, f"{path} names {found}, which the registry names alone"


def test_the_search_for_names_finds_them_in_every_form():
    tree = ast.parse("def is_esft(x): return isinstance(x, LoraMoeConfig) or x.kind == 'capacity' or x.mov_scale")
    assert {"esft", "mov"} <= {word for name in names_of(tree) for word in words_of(name)}
    assert "LoraMoeConfig" in names_of(tree) and texts_of(tree) == ["capacity"]
    assert "expert_lora" in words_of("write expert_lora here") and "esft" in words_of("EsftConfig")
    assert not {"mov", "esft"} & words_of("move removed esfts")


def test_every_file_has_a_mirrored_test():
    for path in files():
        room, _, name = path.rpartition("/")
        mirrored = Path(__file__).parent / room / f"test_{name}"
        assert name == "__init__.py" or mirrored.exists(), f"{path} has no {mirrored}"
