"""What can be checked of the package on an interpreter that has no torch: run this file with it.

Every file compiles; every name that is imported from the standard library exists there; every annotation of a class
evaluates, where `typing` refuses some on Python 3.10; peft's own enum takes new members in the way that the package
appends them.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.util
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "moe_peft"
PEFT_TYPES = "utils/peft_types.py"


class Anything:
    """Stands for a class of a library that this interpreter does not have, in annotations alone."""

    def __class_getitem__(cls, item: object) -> type:
        return cls


def compiled(path: Path) -> ast.Module:
    """The syntax tree of a file, after this interpreter has compiled it."""
    source = path.read_text(encoding="utf-8")
    compile(source, str(path), "exec")
    return ast.parse(source)


def taken(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below one that this interpreter runs, as `if sys.version_info >= ...` has one branch for it."""
    yield node
    if isinstance(node, ast.If) and ast.unparse(node.test).startswith("sys.version_info"):
        holds = eval(ast.unparse(node.test), {"sys": sys})
        children = node.body if holds else node.orelse
    else:
        children = list(ast.iter_child_nodes(node))
    for child in children:
        yield from taken(child)


def standard_names(tree: ast.Module) -> dict[str, object]:
    """Import what a module takes from the standard library, and fail where it is not there.

    Args:
        tree: The module.

    Returns:
        The imported names, and a stand-in for every name of another library.
    """
    names: dict[str, object] = {}
    for node in taken(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                found = importlib.import_module(alias.name) if top in sys.stdlib_module_names else Anything
                names[alias.asname or top] = found if alias.asname or found is Anything else sys.modules[top]
        elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
            known = node.level == 0 and (node.module or "").split(".")[0] in sys.stdlib_module_names
            for alias in node.names:
                found = getattr(importlib.import_module(str(node.module)), alias.name) if known else Anything
                names[alias.asname or alias.name] = found
    return names


def annotations(tree: ast.Module) -> list[tuple[str, str, str]]:
    """Class, field and annotation text of every annotated class attribute of a module."""
    return [
        (node.name, own.target.id, ast.unparse(own.annotation))
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for own in node.body
        if isinstance(own, ast.AnnAssign) and isinstance(own.target, ast.Name)
    ]


def evaluates(text: str, names: dict[str, object]) -> bool:
    """Whether `typing.get_type_hints` takes an annotation; classes of other libraries count as plain ones."""
    holder = type("Holder", (), {"__annotations__": {"field": text}})
    try:
        typing.get_type_hints(holder, globalns=names, localns={**vars(builtins), **names})
    except NameError as error:
        return evaluates(text, {**names, str(error.name): Anything})
    except TypeError as error:
        # `module.Class` of a library that is not there; its parts are not this check's matter.
        return "Anything" in str(error)
    except AttributeError as error:
        return "Anything" in str(error)
    return True


def enum_takes_members(site_packages: Path, registration: Path) -> bool:
    """Append a member to peft's own enum with the package's function, both loaded from their files.

    Args:
        site_packages: Where peft lies; another interpreter's will do, the file is plain Python.
        registration: The package's file.
    """
    spec = importlib.util.spec_from_file_location("peft_types", site_packages / "peft" / PEFT_TYPES)
    assert spec is not None and spec.loader is not None
    peft_types = importlib.util.module_from_spec(spec)
    sys.modules["peft_types"] = peft_types
    spec.loader.exec_module(peft_types)
    tree = compiled(registration)
    wanted = ("extend_peft_type", "_is_complete", "_remove")
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    module = types.ModuleType("registration")
    exec("from __future__ import annotations\nimport pickle", vars(module))
    vars(module)["PeftType"] = peft_types.PeftType
    vars(module)["Any"] = typing.Any
    code = compile(tree, str(registration), "exec", flags=0x1000000)
    exec(code, vars(module))
    member = module.extend_peft_type("ADDED")
    return peft_types.PeftType("ADDED") is member and module.extend_peft_type("ADDED") is member


def main(site_packages: str) -> int:
    """Check every file; print what fails.

    Args:
        site_packages: Folder with peft.

    Returns:
        Number of failures.
    """
    failed, files, checked = [], sorted(PACKAGE.rglob("*.py")), 0
    for path in files:
        try:
            tree = compiled(path)
            names = standard_names(tree)
        except (SyntaxError, ImportError, AttributeError) as error:
            failed.append(f"{path}: {error}")
            continue
        for owner, field, text in annotations(tree):
            checked += 1
            if not evaluates(text, names):
                failed.append(f"{path}: {owner}.{field}: {text} does not evaluate")
    if not enum_takes_members(Path(site_packages), PACKAGE / "tuner" / "registration.py"):
        failed.append("peft.PeftType takes no member")
    print("\n".join(failed) or f"{len(files)} files, {checked} annotations and peft's enum are fine", flush=True)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
