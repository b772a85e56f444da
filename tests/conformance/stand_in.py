"""Our types in the place of `LoraConfig`, for tests of peft that build stock LoRA configurations themselves."""

from __future__ import annotations

import contextlib
from types import ModuleType
from typing import Any

import pytest
import transformers

from .rows import CONFIGS, ONE_EXPERT, SETTINGS
from .tiny_models import tiny_model

NAMES = {"init_lora_weights": "init_weights"}
# What our types do not have, with the only value that they stand for.
ABSENT = {"bias": "none"}
NOT_OF_VECTORS = ("r", "lora_alpha", "lora_dropout", "use_rslora")
CLASSES = {
    "AutoModel": "bert",
    "AutoModelForCausalLM": "llama",
    "AutoModelForSeq2SeqLM": "t5",
    "AutoModelForSequenceClassification": "llama-classifier",
}


def stand_ins(*, one_expert: bool = False) -> list:
    """Rows (a function that takes stock LoRA's arguments and gives a configuration of ours)."""
    settings = ONE_EXPERT if one_expert else SETTINGS
    suffix = "-one-expert" if one_expert else ""
    return [pytest.param(_stand_in(name, settings[name]), id=f"{name}{suffix}") for name in CONFIGS]


def _stand_in(name: str, settings: dict[str, Any]):
    def build(**fields: Any):
        ours = {NAMES.get(key, key): value for key, value in fields.items() if ABSENT.get(key) != value}
        if name == "mov":
            ours = {key: value for key, value in ours.items() if key not in NOT_OF_VECTORS}
        return CONFIGS[name](**{**settings, **ours})

    return build


def install(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, build: Any, models: dict[str, str] | None = None
) -> None:
    """Let a test module of peft build our configurations, and load tiny models whatever it asks the Hub for.

    Args:
        monkeypatch: Undoes it.
        module: The test module.
        build: Takes the place of `LoraConfig`.
        models: Name of a class of transformers -> name of the tiny model it loads, where it is not the usual one.
    """
    monkeypatch.setattr(module, "LoraConfig", build)
    if hasattr(module, "hub_online_once"):
        monkeypatch.setattr(module, "hub_online_once", lambda *_, **__: contextlib.nullcontext())
    for cls, model in {**CLASSES, **(models or {})}.items():
        if hasattr(module, cls):
            monkeypatch.setattr(module, cls, _local(getattr(transformers, cls), model))
    if hasattr(module, "AutoTokenizer"):
        monkeypatch.setattr(module, "AutoTokenizer", _NoTokenizer)


def _local(cls: type, model: str) -> type:
    class Local:
        @staticmethod
        def from_pretrained(name: str, **kwargs: Any):
            kwargs.pop("revision", None)
            # peft's tests name models of the Hub, and folders that they saved themselves.
            folder = str(name) if str(name).startswith("/") else tiny_model(model)
            return cls.from_pretrained(folder, **kwargs)

    return Local


class _NoTokenizer:
    """Tests ask for a tokenizer that the ones we run do not use."""

    @staticmethod
    def from_pretrained(name: str) -> None:
        return None
