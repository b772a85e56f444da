"""Every way of bringing a saved adapter into a model, and what must be as before where one is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from tests.contract.cases import randomize
from tests.tiny import padded_batch

BATCH = padded_batch([9, 6])


def adapted(base: nn.Module, config: PeftConfig, name: str = "default", seed: int = 1) -> PeftModel:
    model = get_peft_model(copy.deepcopy(base), copy.deepcopy(config), adapter_name=name).eval()
    randomize(model, seed)
    return model


def saved(base: nn.Module, config: PeftConfig, folder: Path, seed: int = 1) -> Path:
    adapted(base, config, seed=seed).save_pretrained(folder)
    return folder


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**BATCH).logits.clone()


# Name -> (model that has to stay as it is, what is loaded into it): given a base model, a configuration and a folder.
def _new_model(base, config, folder):
    return base, lambda: PeftModel.from_pretrained(base, folder)


def _new_model_of_a_configuration(base, config, folder):
    return base, lambda: PeftModel.from_pretrained(base, folder, config=copy.deepcopy(config))


def _new_model_on_the_meta_device(base, config, folder):
    return base, lambda: PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True)


def _new_name(base, config, folder):
    model = adapted(base, config, name="other", seed=2)
    return model, lambda: model.load_adapter(folder, adapter_name="new")


def _taken_name(base, config, folder):
    model = adapted(base, config, seed=2)
    return model, lambda: model.load_adapter(str(folder), adapter_name="default")


def _transformers(base, config, folder):
    return base, lambda: base.load_adapter(str(folder))


def _transformers_beside_another(base, config, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base.add_adapter(copy.deepcopy(config), "other")
    randomize(base, 2)
    return base, lambda: base.load_adapter(str(folder), adapter_name="new")


def _hub(base, config, folder):
    """A name on the Hub whose files are in the cache; see the fixture `hub_cache`."""
    return base, lambda: PeftModel.from_pretrained(base, "user/adapter", cache_dir=str(as_hub_cache(folder)))


WAYS: dict[str, Callable] = {
    "from_pretrained": _new_model,
    "from_pretrained(config=)": _new_model_of_a_configuration,
    "from_pretrained(low_cpu_mem_usage=True)": _new_model_on_the_meta_device,
    "load_adapter, new name": _new_name,
    "load_adapter, taken name": _taken_name,
    "transformers": _transformers,
    "transformers, second": _transformers_beside_another,
    "hub": _hub,
}


def as_hub_cache(folder: Path) -> Path:
    """A download cache in which a folder is the adapter "user/adapter"."""
    cache, commit = folder.parent / f"{folder.name}_cache", "a" * 40
    snapshot = cache / "models--user--adapter" / "snapshots" / commit
    if not snapshot.exists():
        snapshot.parent.mkdir(parents=True)
        (cache / "models--user--adapter" / "refs").mkdir()
        (cache / "models--user--adapter" / "refs" / "main").write_text(commit)
        snapshot.symlink_to(folder, target_is_directory=True)
    return cache


def state_of(model: nn.Module) -> dict[str, object]:
    """All that an operation may change: modules, hooks, flags, configurations and values."""
    configs = getattr(model, "peft_config", {})
    return {
        "modules": [(name, id(module), type(module)) for name, module in model.named_modules()],
        "hooks": [
            (name, len(module._forward_pre_hooks), len(module._forward_hooks))
            for name, module in model.named_modules()
        ],
        "attributes": [(name, sorted(vars(module))) for name, module in model.named_modules()],
        "parameters": [(name, id(p), p.requires_grad, p.device.type) for name, p in model.named_parameters()],
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "configs": {name: config.to_dict() for name, config in configs.items()},
        "mode": [module.training for module in model.modules()],
        "adapters loaded": getattr(model, "_hf_peft_config_loaded", None),
        "logits": logits(model),
    }


def assert_unchanged(model: nn.Module, before: dict[str, object]) -> None:
    after = state_of(model)
    for what, value in before.items():
        if what == "values":
            assert value.keys() == after[what].keys()
            assert all(torch.equal(tensor, after[what][name]) for name, tensor in value.items())
        elif what == "logits":
            assert torch.equal(value, after[what])
        else:
            assert value == after[what], what
