"""Values of wrong sorts and of extreme sizes for the fields of every configuration, and what may come of them."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
import warnings
from typing import Any, NamedTuple

import torch
from peft import get_peft_model
from torch import nn

import moe_peft
from moe_peft.config.config import MoeConfig
from tests.contract.cases import tiny_olmoe
from tests.tiny import tiny_llama

from . import snapshot
from .laws import BrokenLawError

LONGEST_ERROR = 1500  # characters: a sentence or two with values that are cut
DEEP: list[Any] = []
for _ in range(900):
    DEEP = [DEEP]

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 10**9, 10**30, 10**400, -(10**400)),
    *(0.0, -0.0, 0.5, 1.0, 2.5, -1.5, 1e-320, 1e38, 1e39, 1e308, math.nan, math.inf, -math.inf),
    *(
        "",
        " ",
        "a",
        "1",
        "0.5",
        "None",
        "true",
        "\u00e9\u4e2d",
        "x" * 10_000,
        "(",
        "*",
        "[",
        "(a+)+$",
        ".*",
        "all-linear",
    ),
    *("q_proj", "dense", "top_k", "relu", "[" * 50_000, "\x00", "{}", "a.b", "__class__", "\u0661", "9" * 5_000),
    *([], [1], [0, 1], [-1], [None], ["q_proj"], [""], [[1]], [1.5], [True], [10**30], ["q_proj", 3], ("q_proj",)),
    *(
        {},
        {"a": 1},
        {"z_loss": 0.1},
        {"z_loss": -1},
        {"z_loss": "x"},
        {1: [0]},
        {"1": [0]},
        {"1": [1.5]},
        {"\u0661": [0]},
    ),
    *({"1": "0"}, {"1": [0, 0]}, {"1": []}, {"9" * 5_000: [0]}, {"1": [10**30]}, {"-1": [0]}, {"embed_tokens": [3]}),
    *(set(), {1}, frozenset({"q_proj"}), b"q_proj", 1j, object(), object, len, DEEP, torch.ones(2), torch.tensor(3)),
)
CLASSES = (
    "LoraMoeConfig",
    "MoloraConfig",
    "SiraConfig",
    "RoutedConfig",
    "MovConfig",
    "PerftConfig",
    "EsftConfig",
    "ExpertLoraConfig",
)
NEEDED = {
    "EsftConfig": {"experts": {"1": [0, 1]}},
    "RoutedConfig": {"num_experts": 3, "r": 2},
    "PerftConfig": {"num_experts": 3, "top_k": 2, "r": 2},
}


class Case(NamedTuple):
    """Fields of one class that are given drawn values."""

    cls: str
    fields: dict[str, Any]

    def __str__(self) -> str:
        shown = ", ".join(
            f"{name}={repr(value)[:80] if value is not DEEP else '[[[...]]]'}" for name, value in self.fields.items()
        )
        return f"{self.cls}({shown})"


def fields_of(cls: str) -> list[str]:
    """Names of the fields that a user can give."""
    return [own.name for own in dataclasses.fields(getattr(moe_peft, cls)) if own.init]


def all_cases() -> list[Case]:
    """Each field of each class with each value."""
    return [Case(cls, {name: value}) for cls in CLASSES for name in fields_of(cls) for value in VALUES]


def draw_case(rng: random.Random) -> Case:
    """Two or three fields at once."""
    cls = rng.choice(CLASSES)
    names = rng.sample(fields_of(cls), rng.randint(2, 3))
    return Case(cls, {name: rng.choice(VALUES) for name in names})


def check_case(case: Case, base: nn.Module, batch: dict[str, torch.Tensor]) -> str:
    """Build, attach, and train one step; only clear errors may come of it.

    Args:
        case: The configuration.
        base: A model that is left as it is.
        batch: What it is trained on.

    Returns:
        How far it came: "refused", "refused by the model", or "trained".

    Raises:
        BrokenLawError: Another error, one that does not name the field, or a base that was changed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = getattr(moe_peft, case.cls)(**{**NEEDED.get(case.cls, {}), **copied(case.fields)})
        except (ValueError, TypeError) as error:
            _check_message(case, error)
            return "refused"
        except BaseException as error:
            raise BrokenLawError(_bare(error, "configuration"), str(case)) from error
        return _attach(case, config, base, batch)


def copied(fields: dict[str, Any]) -> dict[str, Any]:
    """Values of their own, as a configuration may change containers."""
    return {
        name: copy.copy(value) if isinstance(value, (list, dict, set)) else value for name, value in fields.items()
    }


def _attach(case: Case, config: MoeConfig, base: nn.Module, batch: dict[str, torch.Tensor]) -> str:
    before = snapshot.take(base)
    try:
        model = get_peft_model(base, config)
    except (ValueError, TypeError) as error:
        _check_message(case, error)
        changed = snapshot.difference(before, snapshot.take(base))
        if changed:
            raise BrokenLawError("a refused configuration leaves the base as it was", f"{case}: {changed}") from error
        return "refused by the model"
    except BaseException as error:
        raise BrokenLawError(_bare(error, "attaching"), str(case)) from error
    try:
        output = model.train()(**batch)
        if not config.inference_mode:
            output.loss.backward()
        if not torch.isfinite(output.loss):
            raise BrokenLawError("what is accepted has a finite loss", str(case))
    except BrokenLawError:
        raise
    except BaseException as error:
        raise BrokenLawError(_bare(error, "training"), str(case)) from error
    return "trained"


def _bare(error: BaseException, moment: str) -> str:
    return f"only clear errors in {moment}: {type(error).__name__}: {str(error)[:80]}"


def _check_message(case: Case, error: Exception) -> None:
    text = str(error)
    if len(text) > LONGEST_ERROR:
        raise BrokenLawError("values in errors are cut", f"{case}: {len(text)} characters: {text[:200]}")
    if not any(name in text.lower().replace(" ", "_") for name in case.fields):
        raise BrokenLawError("errors name the field", f"{case}: {type(error).__name__}: {text[:200]}")


def base_for(cls: str) -> nn.Module:
    """A frozen model that the class fits."""
    base = tiny_olmoe() if cls in ("EsftConfig", "ExpertLoraConfig", "PerftConfig") else tiny_llama()
    return base.eval().requires_grad_(False)
