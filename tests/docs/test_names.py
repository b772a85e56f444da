"""Names that the pages give exist: of the package, of fields as flags, of the command's verbs and configurations."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shlex

import pytest
from flags import SCRIPT_FIELDS

from moe_peft.cli.verbs import VERBS
from moe_peft.methods import METHODS
from tests.docs.pages import OTHERS, PAGES, ROOT, name_of, programs, prose

# Commands of the scripts' own page are parsed in tests/train.
DOCUMENTS = [page for page in [*PAGES, *OTHERS] if page.name != "CHANGELOG.md" and page.parent.name != "train"]
FIELDS = {own.name for config in METHODS.values() for own in dataclasses.fields(config)}


def resolve(path: str) -> object:
    """What a dotted name stands for."""
    names = path.split(".")
    for count in range(len(names), 0, -1):
        try:
            found = importlib.import_module(".".join(names[:count]))
        except ModuleNotFoundError:
            continue
        for name in names[count:]:
            found = getattr(found, name)
        return found
    raise AttributeError(path)


@pytest.mark.parametrize("page", DOCUMENTS, ids=name_of)
def test_names_of_the_package_exist(page):
    for path in re.findall(r"`(moe_peft(?:\.[A-Za-z_]\w*)+)(?!\w|/)", prose(page)):
        if not path.endswith(".py"):
            assert resolve(path) is not None, path


@pytest.mark.parametrize("page", DOCUMENTS, ids=name_of)
def test_flags_of_adapters_are_fields_and_verbs_and_configurations_exist(page):
    own = {"moe_config", "moe_preset", *SCRIPT_FIELDS}
    for flag in re.findall(r"--(moe_\w+)", page.read_text()):
        assert flag in own or flag.removeprefix("moe_") in FIELDS, flag
    for block in programs(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["moe-peft"]:
                assert words[1] in VERBS, line
            if "--config" in words[:-1]:
                name = words[words.index("--config") + 1]
                named = name == "RUN.yaml" or (ROOT / name).is_file()
                assert named or (ROOT / f"configs/runs/{name}.yaml").is_file(), line


def test_a_name_that_does_not_exist_is_seen():
    with pytest.raises(AttributeError):
        resolve("moe_peft.integrations.history.RoutingHistory")
    assert resolve("moe_peft.describe.Description").__name__ == "Description"
