"""The adapter types are real members of peft's enum and entries of its registry, and come and go whole."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
from dataclasses import dataclass

import pytest
from peft import PeftConfig, PeftType
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from moe_peft.methods import METHODS
from moe_peft.methods.loramoe import LoraMoeModel
from moe_peft.tuner import registration
from moe_peft.tuner.tuner import RoutedTuner

MAPPINGS = (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)


@dataclass
class NewConfig(PeftConfig):
    adapter_type = "BRANDNEW"


class NewModel(RoutedTuner):
    prefix = "brandnew_"


@pytest.fixture
def new_type():
    yield "BRANDNEW"
    if "BRANDNEW" in PeftType.__members__:
        member = PeftType["BRANDNEW"]
        registration._remove("BRANDNEW", member)
        for mapping in MAPPINGS:
            mapping.pop(member, None)


@pytest.mark.parametrize("config_cls", METHODS.values())
def test_types_are_members_and_entries_like_pefts_own(config_cls):
    name = config_cls.adapter_type
    member = PeftType(name)
    assert member is PeftType[name] is getattr(PeftType, name)
    assert member == name and isinstance(member, PeftType) and member in list(PeftType)
    assert str(member) == f"PeftType.{name}" and member.value == name and hash(member) == hash(PeftType[name])
    assert pickle.loads(pickle.dumps(member)) is member
    assert PEFT_TYPE_TO_CONFIG_MAPPING[name] is config_cls
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == f"{name.lower()}_" == PEFT_TYPE_TO_TUNER_MAPPING[member].prefix
    assert config_cls().peft_type is member


def test_prefixes_are_nobody_elses():
    prefixes = list(PEFT_TYPE_TO_PREFIX_MAPPING.values())
    for config_cls in METHODS.values():
        assert prefixes.count(f"{config_cls.adapter_type.lower()}_") == 1


def test_registering_twice_changes_nothing():
    before = [dict(mapping) for mapping in MAPPINGS]
    members = list(PeftType)
    registration.register(METHODS["loramoe"], LoraMoeModel)
    assert [dict(mapping) for mapping in MAPPINGS] == before and list(PeftType) == members
    assert registration.extend_peft_type("LORAMOE") is PeftType["LORAMOE"]


def test_reloading_a_method_keeps_its_member():
    import moe_peft.methods.sira as sira

    member, before, registered = PeftType["SIRA"], dict(vars(sira)), [dict(mapping) for mapping in MAPPINGS]
    try:
        importlib.reload(sira)
        assert PeftType["SIRA"] is member
        assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is sira.SiraConfig
    finally:
        # The classes of before are those that everything else has imported, and that can be pickled.
        vars(sira).update(before)
        for mapping, entries in zip(MAPPINGS, registered, strict=True):
            mapping.update(entries)


def test_a_type_of_another_package_is_not_taken_over():
    @dataclass
    class Intruder(PeftConfig):
        adapter_type = "LORAMOE"

    with pytest.raises(RuntimeError, match=r"already registered by moe_peft.methods.loramoe.LoraMoeConfig"):
        registration.register(Intruder, LoraMoeModel)
    assert PEFT_TYPE_TO_CONFIG_MAPPING["LORAMOE"] is METHODS["loramoe"]


def test_prefix_must_follow_from_the_type(new_type):
    class Wrong(RoutedTuner):
        prefix = "other_"

    with pytest.raises(ValueError, match="must be 'brandnew_'"):
        registration.register(NewConfig, Wrong)
    assert new_type not in PeftType.__members__


def test_a_refused_registration_leaves_no_trace(new_type, monkeypatch):
    before = [dict(mapping) for mapping in MAPPINGS]

    def refuse(**kwargs):
        PEFT_TYPE_TO_PREFIX_MAPPING[PeftType[new_type]] = kwargs["prefix"]
        PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[new_type]] = kwargs["config_cls"]
        raise KeyError("no")

    monkeypatch.setattr(registration, "register_peft_method", refuse)
    with pytest.raises(KeyError):
        registration.register(NewConfig, NewModel)
    assert [dict(mapping) for mapping in MAPPINGS] == before
    assert new_type not in PeftType.__members__ and not hasattr(PeftType, new_type)
    with pytest.raises(ValueError, match="BRANDNEW"):
        PeftType(new_type)


def test_an_enum_that_does_not_take_the_member_is_left_as_it_was(new_type, monkeypatch):
    monkeypatch.setattr(registration, "_is_complete", lambda name, member: False)
    with pytest.raises(RuntimeError, match="did not accept the adapter type 'BRANDNEW'"):
        registration.extend_peft_type(new_type)
    assert new_type not in PeftType.__members__ and not hasattr(PeftType, new_type)


def test_a_pickled_configuration_opens_in_a_fresh_process(tmp_path):
    path = tmp_path / "config.pickle"
    path.write_bytes(pickle.dumps(METHODS["molora"](num_experts=3)))
    code = (
        f"import pickle; config = pickle.load(open({str(path)!r}, 'rb')); print(config.peft_type, config.num_experts)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["PeftType.MOLORA", "3"]


def test_the_unrelated_distribution_is_named_by_one_clear_sentence(tmp_path):
    metadata = tmp_path / "moe_peft-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: moe-peft\nVersion: 1.0\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import moe_peft"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0 and "pip uninstall moe-peft" in result.stderr
