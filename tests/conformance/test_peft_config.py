"""Configurations: saving, loading, copies, versions, unknown keys."""

import pytest
from peft import LoraConfig, PeftType

from . import rows
from .retarget import retarget
from .sources import load

peft = load("test_config")


@pytest.fixture(autouse=True)
def local_adapter(tmp_path_factory, monkeypatch):
    """A stock LoRA adapter's file in place of the one on the Hub that some tests load."""
    folder = tmp_path_factory.mktemp("adapter")
    LoraConfig(target_modules=["q_proj"]).save_pretrained(folder)
    monkeypatch.setattr(peft, "PEFT_MODELS_TO_TEST", [(str(folder), None)])


@pytest.fixture(autouse=True)
def own_types(monkeypatch):
    """Our members of peft's enum in place of all; a stock type needs a package that is not installed."""
    monkeypatch.setattr(peft, "PeftType", [PeftType[row.values[0].adapter_type] for row in rows.ALL_CLASSES])


TestPeftConfig = retarget(
    peft.TestPeftConfig,
    (peft.ALL_CONFIG_CLASSES, rows.ALL_CLASSES_AND_KWARGS),
    (peft.LAYER_INDEXING_CONFIG_CLASSES, rows.ALL_CLASSES_AND_KWARGS),
    inline={"test_save_pretrained_with_target_modules": rows.ALL_CLASSES},
    keep=("test_from_peft_type",),
)
