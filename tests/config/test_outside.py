"""A card names the modules that must be imported first, and shows the settings that their classes declare."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum
from typing import ClassVar

from peft.config import PeftConfig

from moe_peft import LoraMoeConfig, RoutedConfig
from moe_peft.config.card_section import section
from moe_peft.config.outside import outside_modules
from moe_peft.extend import SCORERS, LinearRouter


class Own(LinearRouter):
    """z = W x."""


class Pace(Enum):
    SLOW = 1


@dataclass
class OwnConfig(LoraMoeConfig):
    note: ClassVar[str] = "no field"
    tone: str = "soft"
    parts: tuple[int, ...] = ()
    pace: Pace = Pace.SLOW


def test_modules_outside_of_the_package_are_listed_with_their_classes():
    assert outside_modules([LoraMoeConfig, LinearRouter]) == {}
    assert outside_modules([Own, LinearRouter, OwnConfig, Own]) == {__name__: ["Own", "OwnConfig"]}


def test_the_card_imports_them_after_the_package(monkeypatch):
    monkeypatch.setitem(SCORERS, "own", Own)
    text = section(RoutedConfig(scorer="own").facts())
    assert f"```python\nimport moe_peft\nimport {__name__}  # Own\nfrom peft" in text
    assert "```python\nimport moe_peft\nfrom peft" in section(RoutedConfig().facts())
    monkeypatch.setattr(Own, "__module__", "__main__")
    assert "import moe_peft\n# run the program that defines Own first\n" in section(RoutedConfig(scorer="own").facts())


def test_the_card_shows_the_fields_of_a_method_from_outside_where_they_are_set():
    assert "| tone | loud |" in section(OwnConfig(tone="loud", parts=(2, 3)).facts())
    assert "| parts | 2, 3 |" in section(OwnConfig(tone="loud", parts=(2, 3)).facts())
    assert "note" not in OwnConfig().facts().settings and "tone" not in LoraMoeConfig().facts().settings


def test_the_card_shows_values_as_a_file_holds_them_and_nothing_of_what_peft_writes_for_itself():
    settings = OwnConfig(task_type="CAUSAL_LM", base_model_name_or_path="folder", inference_mode=True).facts().settings
    assert settings["pace"] == 1 and not settings.keys() & {own.name for own in fields(PeftConfig)}
