"""The rows of peft's test tables for the adapter types of moe_peft."""

from typing import Any

import pytest

from moe_peft import (
    EsftConfig,
    LoraMoeConfig,
    MoloraConfig,
    MovConfig,
    PerftConfig,
    RoutedConfig,
    SiraConfig,
)

from .tiny_models import tiny_model

# Types that wrap linear layers, and those that wrap blocks or the backbone's experts, which need a model with some.
CONFIGS = {
    "loramoe": LoraMoeConfig,
    "molora": MoloraConfig,
    "sira": SiraConfig,
    "routed": RoutedConfig,
    "mov": MovConfig,
}
OTHER_CONFIGS = {"perft": PerftConfig, "esft": EsftConfig}

# Few experts keep the tests fast; peft compares outputs in train mode, which dropout would change.
SETTINGS: dict[str, dict[str, Any]] = {
    "loramoe": {"num_experts": 4, "lora_dropout": 0.0},
    # A larger scale can push all inputs of the toy model's second layer below zero in one of peft's large steps.
    "molora": {"num_experts": 4, "init_weights": True, "lora_alpha": 4},
    "sira": {"num_experts": 4, "top_k": 2, "expert_dropout": 0.0},
    "routed": {"num_experts": 4},
    "mov": {"num_experts": 4},
}

# One expert has the same weight for every token, so that these rows run peft's merge tests.
ONE_EXPERT: dict[str, dict[str, Any]] = {
    "loramoe": {"num_experts": 1, "lora_dropout": 0.0},
    "molora": {"num_experts": 1, "init_weights": True},
    "sira": {"num_experts": 1, "top_k": 1, "expert_dropout": 0.0, "capacity_factor": None},
    "routed": {"num_experts": 1},
    "mov": {"num_experts": 1},
}

PERFT: dict[str, dict[str, Any]] = {
    "perft-r": {"variant": "R", "r": 4, "num_experts": 4, "top_k": 2, "lora_dropout": 0.0},
    "perft-d": {"variant": "D", "r": 4, "num_experts": 2, "lora_dropout": 0.0},
}
EXPERTS: dict[str, tuple[type, dict[str, Any]]] = {
    "perft-e": (PerftConfig, {"variant": "E", "r": 4, "lora_dropout": 0.0}),
    "esft": (EsftConfig, {"experts": {"0": [0, 2], "1": [1]}}),
    "esft-lora": (EsftConfig, {"experts": {"0": [0, 2], "1": [1]}, "expert_adapter": "lora", "r": 4}),
}

CLASSES = [pytest.param(cls, id=name) for name, cls in CONFIGS.items()]
ALL_CLASSES = [*CLASSES, *(pytest.param(cls, id=name) for name, cls in OTHER_CONFIGS.items())]
ALL_CLASSES_AND_KWARGS = [pytest.param(cls, {}, id=name) for name, cls in (*CONFIGS.items(), *OTHER_CONFIGS.items())]


def config_rows(**kwargs: Any) -> list:
    """Rows (config_cls, config_kwargs): each type with several experts."""
    return [pytest.param(CONFIGS[name], {**SETTINGS[name], **kwargs}, id=name) for name in CONFIGS]


def one_expert_rows(**kwargs: Any) -> list:
    """Rows (config_cls, config_kwargs): each type with one expert, which can be merged."""
    return [pytest.param(CONFIGS[name], {**ONE_EXPERT[name], **kwargs}, id=f"{name}-one-expert") for name in CONFIGS]


def block_rows(**kwargs: Any) -> list:
    """Rows (config_cls, config_kwargs): adapters beside whole blocks."""
    return [pytest.param(PerftConfig, {**settings, **kwargs}, id=name) for name, settings in PERFT.items()]


def expert_rows(**kwargs: Any) -> list:
    """Rows (config_cls, config_kwargs): adapters that follow the backbone's own routing."""
    return [pytest.param(cls, {**settings, **kwargs}, id=name) for name, (cls, settings) in EXPERTS.items()]


def model_rows(*names: str) -> list:
    """Rows (model_id) of tiny models."""
    return [pytest.param(tiny_model(name), id=name) for name in names]


def custom_model_rows() -> list:
    """Rows (test_name, model_id, config_cls, config_kwargs) on peft's toy models."""
    places = {
        "lin0-lin1": ("MLP", {"target_modules": ["lin0", "lin1"]}),
        "lin0-saved-lin1": ("MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
        "conv1d-lin0-saved-emb": (
            "EmbConv1D",
            # Gradients are small in this model, so the scale is larger again.
            {"target_modules": ["conv1d", "lin0"], "modules_to_save": ["emb"], "lora_alpha": 16},
        ),
    }
    rows = [
        _custom(f"{method}-{place}", model, method, SETTINGS[method], kwargs)
        for method in CONFIGS
        for place, (model, kwargs) in places.items()
    ]
    rows += [
        _custom(f"{method}-one-expert-{place}", places[place][0], method, ONE_EXPERT[method], places[place][1])
        for method in CONFIGS
        for place in ("lin0-lin1", "conv1d-lin0-saved-emb")
    ]
    variants: dict[str, tuple[str, dict[str, Any]]] = {
        "loramoe-defaults": ("loramoe", {}),
        "molora-defaults": ("molora", {}),
        "molora-top-k": ("molora", {**SETTINGS["molora"], "top_k": 2}),
        "sira-defaults": ("sira", {}),
        "routed-defaults": ("routed", {}),
        "routed-dense-localized": (
            "routed",
            {"router": "dense", "router_aux_loss_coef": 0.0, "losses": {"localized_balancing": 0.1}},
        ),
        "routed-eager": ("routed", {"num_experts": 3, "experts_implementation": "eager"}),
        "mov-defaults": ("mov", {}),
        "mov-top-k": ("mov", {**SETTINGS["mov"], "top_k": 2}),
        "mov-hidden": ("mov", {**SETTINGS["mov"], "router_input": "hidden"}),
        "mov-inputs": ("mov", {**SETTINGS["mov"], "feedforward_modules": ["lin0"]}),
        "mov-one-expert-inputs": ("mov", {**ONE_EXPERT["mov"], "feedforward_modules": ["lin0", "lin1"]}),
    }
    rows += [
        _custom(name, "MLP", method, kwargs, places["lin0-lin1"][1]) for name, (method, kwargs) in variants.items()
    ]
    return rows


def _custom(name: str, model: str, method: str, settings: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    return pytest.param(name, model, CONFIGS[method], _fields(method, {**settings, **kwargs}), id=name)


def _fields(method: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that a type has: vectors have no scale."""
    return {name: value for name, value in fields.items() if method != "mov" or name != "lora_alpha"}


def two_adapter_rows() -> list:
    """Rows (test_name, tuner_method, config_cls, kwargs of the first adapter, kwargs of the second)."""
    rows = []
    for kind, settings in (("", SETTINGS), ("-one-expert", ONE_EXPERT)):
        for method, cls in CONFIGS.items():
            for place, second in (("same", ["lin0"]), ("different", ["lin1"]), ("partly", ["lin0", "lin1"])):
                shared = {**settings[method], "init_weights": False}
                name = f"{method}{kind}-{place}"
                rows.append(
                    pytest.param(
                        name,
                        method,
                        cls,
                        {**shared, "target_modules": ["lin0"]},
                        {**shared, "target_modules": second},
                        id=name,
                    )
                )
    return rows


def mixed_batch_rows(first: dict[str, Any], second: dict[str, Any]) -> list:
    """Rows (test_name, config of the first adapter, config of the second), for batches with an adapter per row."""
    rows = []
    for kind, settings in (("", SETTINGS), ("-one-expert", ONE_EXPERT)):
        for method, cls in CONFIGS.items():
            # Large outputs of the toy model would round differently in parts of a batch.
            shared = _fields(method, {**settings[method], "init_weights": False, "lora_alpha": 1})
            name = f"{method}{kind}"
            rows.append(pytest.param(name, cls(**shared, **first), cls(**shared, **second), id=name))
    return rows


def wrong_name_rows() -> list:
    """Rows (test_name, config)."""
    return [
        pytest.param(name, cls(target_modules=["lin0"], init_weights=False), id=name) for name, cls in CONFIGS.items()
    ]
