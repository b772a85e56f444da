"""The file of a configuration, what it says of the weights beside it, and its part of a model card."""

from __future__ import annotations

import dataclasses
import inspect
import tempfile
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from peft.config import PeftConfig

from ..files import write_text
from ..messages import shown
from .adapter_files import CONFIG, check_adapter_files, read_json_object
from .card_section import SETTINGS, AdapterFacts, write_section
from .checked import CheckedConfig
from .outside import outside_modules
from .stored import stored

C = TypeVar("C", bound="SavedConfig")


@dataclass
class SavedConfig(CheckedConfig):
    """A configuration with a file and a card.

    Attributes:
        method: Name of the method.
        equation: What it computes, in plain text.
        source: Its paper.
        adapter_type: peft's name of the type, in capitals.
        fixed_fields: Field name -> why its default is the only value.
    """

    method: ClassVar[str] = ""
    equation: ClassVar[str] = ""
    source: ClassVar[str] = ""
    adapter_type: ClassVar[str] = ""
    fixed_fields: ClassVar[dict[str, str]] = {}

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Refuse the fields of another adapter type, which peft would load as that type without a word."""
        found = kwargs.get("peft_type", cls.adapter_type)
        if cls.adapter_type and str(found) != cls.adapter_type:
            raise ValueError(
                f"This adapter_config.json has peft_type={shown(found)}, but {cls.__name__} loads "
                f"{shown(cls.adapter_type)}. Use peft.PeftConfig.from_pretrained, which picks the class by the file."
            )
        return super().check_kwargs(**kwargs)

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Read the fields of a file; arguments as in peft.

        Raises:
            ValueError: It is no JSON, is nested too deeply, or holds something else than an object.
        """
        fields = read_json_object(path_json_file)
        fields.pop("runtime_config", None)  # of a run, which peft leaves out as well
        return fields

    @classmethod
    def from_pretrained(
        cls: type[C], pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> C:
        """Load a configuration, after checking that the weights beside it are complete; arguments as in peft.

        Raises:
            ValueError: The folder's weights are truncated, not safetensors, or do not fit the configuration.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        check_adapter_files(pretrained_model_name_or_path, subfolder, config.expected_shapes())
        return config

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, as in peft, of values that a file of JSON can hold."""
        return {name: stored(value) for name, value in super().to_dict().items()}

    def expected_shapes(self) -> dict[str, tuple[int, ...]]:
        """How the shapes of saved tensors begin, by the end of their names."""
        return {}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the configuration, and say in the folder's model card how to load the adapter; arguments as in peft.

        Both files are written beside and renamed, so that no reader meets half of one.

        Raises:
            ValueError: There is a file in the place of the folder.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"save_directory={shown(str(folder))} is a file; name a folder.")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as beside:
            super().save_pretrained(beside, **kwargs)
            write_text(folder / CONFIG, Path(beside, CONFIG).read_text(encoding="utf-8"))
        write_section(folder, self.facts())

    def card_fields(self) -> list[str]:
        """Fields that a model card shows where they are set; all that a class outside of the package declares."""
        known = {own.name for own in dataclasses.fields(self)}
        known -= {own.name for own in dataclasses.fields(PeftConfig)}
        declaring = [base for base in type(self).__mro__ if dataclasses.is_dataclass(base) and outside_modules([base])]
        own = [name for base in declaring for name in inspect.get_annotations(base) if name in known]
        return list(dict.fromkeys([*(name for name in SETTINGS if name in known), *own]))

    def classes(self) -> list[type]:
        """The classes that must be there before the configuration can be loaded: its own, and those of its parts."""
        return [type(self)]

    def facts(self) -> AdapterFacts:
        """What a model card can say about this adapter without its weights."""
        settings: dict[str, object] = {}
        for name in self.card_fields():
            value = stored(getattr(self, name))
            value = value.value if isinstance(value, Enum) else value
            if name not in self.fixed_fields and value not in (None, False, 0.0) and value != [] and value != {}:
                settings[name] = sorted(value) if isinstance(value, (set, frozenset)) else value
        return AdapterFacts(
            method=self.method,
            adapter_type=self.adapter_type,
            equation=self.equation,
            source=self.source,
            task_type=self.task_type,
            settings=settings,
            base_model=self.base_model_name_or_path,
            imports=outside_modules(self.classes()),
        )
