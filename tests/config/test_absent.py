"""A type has the fields that mean something for it; files of before, which hold others, still load."""

from __future__ import annotations

import dataclasses
import json
import warnings

import pytest
from peft import PeftConfig

from moe_peft import EsftConfig, LoraMoeConfig, MoloraConfig, MovConfig
from moe_peft.config.fields import RoutedMoeConfig
from moe_peft.methods import METHODS

# Every field of version 0.1.0 that the types shared, with what its files hold.
SHARED = {entry.name: entry.default for entry in dataclasses.fields(RoutedMoeConfig)} | {"target_parameters": None}
# Values of another kind than the known ones.
OTHERS = {bool: lambda value: not value, int: lambda value: value + 1, float: lambda value: value + 0.25}


def known_value(cls, name):
    """What a file of the type held, by the fields it has and those it goes without."""
    if name in cls.absent_fields:
        return cls.absent_fields[name][0]
    return next(entry.default for entry in dataclasses.fields(cls) if entry.name == name)


@pytest.mark.parametrize("cls", METHODS.values())
def test_files_with_all_fields_of_before_load_without_a_word(cls, tmp_path):
    content = {name: known_value(cls, name) for name in SHARED} | {"peft_type": cls.adapter_type}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for loader in (cls, PeftConfig):
            loaded = loader.from_pretrained(tmp_path)
            assert type(loaded) is cls and loaded.to_dict() == cls().to_dict()


@pytest.mark.parametrize("cls", METHODS.values())
def test_another_value_of_an_absent_field_is_refused_with_the_reason(cls, tmp_path):
    for name, (value, reason) in cls.absent_fields.items():
        other = OTHERS.get(type(value), lambda value: "other")(value)
        for given in (other, [other], "x" * 1000):
            with pytest.raises(ValueError, match=f"^{cls.__name__}: {name}=") as error:
                cls(**{name: given})
            assert reason in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("cls", METHODS.values())
def test_no_field_is_refused_in_all_but_one_value(cls):
    """Fixed are the router's name, which says how the method routes, and what files before held."""
    names = {entry.name for entry in dataclasses.fields(cls)}
    assert not names & cls.absent_fields.keys()
    assert set(cls.fixed_fields) <= {"router"}


def test_absent_fields_are_neither_attributes_nor_saved(tmp_path):
    EsftConfig(experts={"1": [0]}).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not saved.keys() & EsftConfig.absent_fields.keys() and "experts" in saved
    assert not hasattr(EsftConfig(), "num_experts") and not hasattr(MovConfig(), "lora_alpha")
    assert {"top_k", "capacity_factor"} <= LoraMoeConfig.absent_fields.keys()
    assert "top_k" not in MoloraConfig.absent_fields


def test_an_unknown_name_beside_an_absent_field_does_not_hide_its_value(tmp_path):
    content = {"peft_type": "ESFT", "num_experts": 5, "from_the_future": 1}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="num_experts=5 must be left at 8: the backbone routes"):
        PeftConfig.from_pretrained(tmp_path)
