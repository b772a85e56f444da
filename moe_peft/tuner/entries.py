"""The ways in and out of peft and transformers that no method of a tuner sees, where adapters of this package pass.

peft asks a tuner how to inject an adapter and how to name its tensors, but reads the file itself: into a name that is
taken it loads whatever fits, and a pickle where there is nothing else; transformers reads the file on its own, and
switches adapters layer by layer. So the methods that read or write an adapter's folder, and those that switch
adapters, are put in frames here, which check before and mend after the original, and call it alone for adapters of
other packages. Nothing else of peft or transformers is changed.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel
from transformers.integrations.peft import PeftAdapterMixin

from ..backbone.local_experts import local_experts
from ..config.adapter_files import check_values, header_of
from ..config.config import MoeConfig
from ..layers import RoutedLayer
from ..messages import shown
from .incoming import Incoming, announced, check_incoming, current
from .saving import check_whole, finish_saving, prepare_saving
from .sources import download_options, meaning_beside, open_weights, routed_config_class
from .tensors import present_tensors
from .tracking import refuse_in_use
from .transaction import unchanged_on_error

MARK = "_moe_peft_original"
Call = Callable[[], Any]
Frame = Callable[[Call, Mapping[str, Any]], Any]


def frame_entries() -> None:
    """Put the frames around the originals, once."""
    for owner, name, frame in FRAMES:
        static = inspect.getattr_static(owner, name)
        original = static.__func__ if isinstance(static, classmethod) else static
        if not hasattr(original, MARK):
            framed = _framed(original, frame)
            setattr(owner, name, classmethod(framed) if isinstance(static, classmethod) else framed)


def _framed(original: Callable[..., Any], frame: Frame) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return original(*args, **kwargs)  # which says what is wrong with the arguments
        bound.apply_defaults()
        further = bound.arguments.get("kwargs", {})
        return frame(lambda: original(*args, **kwargs), {**further, **bound.arguments})

    setattr(call, MARK, original)
    return call


def _new_model(call: Call, given: Mapping[str, Any]) -> Any:
    """`PeftModel.from_pretrained`."""
    config, options, source = given["config"], download_options(given), str(given["model_id"])
    if config is not None and not isinstance(config, MoeConfig):
        return call()
    if config is None and routed_config_class(source, options) is None:
        return call()
    mapping = given["key_mapping"] or getattr(given["model"], "_checkpoint_conversion_mapping", None)
    file = open_weights(source, options, mapping)
    beside = None if config is None else meaning_beside(source, options)
    incoming = Incoming(file, source, given["adapter_name"], meaning=beside)
    with unchanged_on_error(given["model"], config), announced(incoming), _named_errors(source):
        return call()


def _further_adapter(call: Call, given: Mapping[str, Any]) -> Any:
    """`PeftModel.load_adapter`."""
    model, name, source = given["self"], given["adapter_name"], str(given["model_id"])
    known = current(name)
    if known is not None and known.source == source:
        return call()  # the second half of from_pretrained
    options = download_options(given)
    config = model.peft_config.get(name) if isinstance(name, str) else None
    if not isinstance(config, MoeConfig) if config is not None else routed_config_class(source, options) is None:
        return call()
    file = open_weights(source, options, given["key_mapping"])
    beside = None if config is None else meaning_beside(source, options)
    incoming = Incoming(file, source, name, meaning=beside)
    if config is not None:
        prefix = f"{config.adapter_type.lower()}_"
        check_incoming(incoming, config, prefix, present_tensors(model, prefix, name), model.get_base_model())
    with unchanged_on_error(model), announced(incoming), _named_errors(source):
        return call()


def _transformers_adapter(call: Call, given: Mapping[str, Any]) -> Any:
    """`load_adapter` of a model of transformers."""
    model, config, tensors = given["self"], given["peft_config"], given["adapter_state_dict"]
    source, options = _transformers_source(given)
    name = "default" if given["adapter_name"] is None else given["adapter_name"]
    if (
        not isinstance(config, MoeConfig)
        if config is not None
        else (source is None or routed_config_class(source, options) is None)
    ):
        return call()
    if any(local_experts(module) is not None for module in model.modules()):
        raise ValueError(
            f"The experts of {type(model).__name__} are shared out over processes, and transformers' load_adapter "
            f"does not split an adapter like them. Use PeftModel.from_pretrained(model, {shown(str(source))}). "
            "Nothing has been changed."
        )
    beside = None
    if tensors is not None:
        check_values("The given state dict", tensors, own=())
        file = header_of(tensors)
    elif source is not None:
        file = open_weights(source, options)
        beside = None if config is None else meaning_beside(source, options)
    else:
        return call()
    incoming = Incoming(file, str(source), name, bare_keys=True, meaning=beside)
    with unchanged_on_error(model, config), announced(incoming), _named_errors(str(source)):
        return call()


def _transformers_source(given: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Folder or name that transformers will load from, and its options for downloading."""
    load_config = given["load_config"]
    inner = getattr(load_config, "download_kwargs", None) or {}
    options = {**inner, **(given.get("download_kwargs") or {}), **(given["adapter_kwargs"] or {})}
    if given["local_files_only"]:
        options["local_files_only"] = True
    source = given["peft_model_id"] or given.get("pretrained_model_name_or_path")
    source = source or getattr(load_config, "pretrained_model_name_or_path", None)
    return None if source is None else os.fspath(source), download_options(options)


def _save(call: Call, given: Mapping[str, Any]) -> Any:
    """`PeftModel.save_pretrained`."""
    model, folder = given["self"], Path(given["save_directory"])
    names = list(model.peft_config) if given["selected_adapters"] is None else given["selected_adapters"]
    routed = {
        name: folder if name == "default" else folder / name
        for name in names
        if isinstance(model.peft_config.get(name), MoeConfig)
    }
    gathered_elsewhere = given.get("state_dict") == {} and not given["is_main_process"]
    if gathered_elsewhere and len(routed) == len(names):
        return None  # the first process has the tensors, and writes them
    if routed and not given["safe_serialization"]:
        raise ValueError(
            f"safe_serialization={shown(given['safe_serialization'])} would write adapter_model.bin, but that file "
            "is a pickle, which can run code when it is read, so that no routed adapter is loaded from it. Leave the "
            "argument out. Nothing has been written."
        )
    for name, own in routed.items():
        check_whole(model, name, given.get("state_dict"))
        if given["is_main_process"]:
            prepare_saving(model.peft_config[name], own)
    result = call()
    for name, own in routed.items():
        if given["is_main_process"]:
            finish_saving(model, model.peft_config[name], name, own)
    return result


def _save_transformers(call: Call, given: Mapping[str, Any]) -> Any:
    """`save_pretrained` of a model of transformers, which saves the active adapter where there is one."""
    model = given["self"]
    result = call()
    if getattr(model, "_hf_peft_config_loaded", False) and given["is_main_process"]:
        name = model.active_adapters()[0]
        if isinstance(model.peft_config.get(name), MoeConfig):
            finish_saving(model, model.peft_config[name], name, Path(given["save_directory"]))
    return result


def _add_transformers(call: Call, given: Mapping[str, Any]) -> Any:
    """`add_adapter` of a model of transformers, which activates what it has injected."""
    config = given["adapter_config"]
    if not isinstance(config, MoeConfig):
        return call()
    with unchanged_on_error(given["self"], config):
        return call()


def _switch(operation: str) -> Frame:
    """A method that changes which adapters act, module by module: all of them, or none where one refuses."""

    def frame(call: Call, given: Mapping[str, Any]) -> Any:
        model = given["self"]
        if not any(isinstance(module, RoutedLayer) for module in model.modules()):
            return call()
        refuse_in_use(model, operation)
        with unchanged_on_error(model):
            return call()

    return frame


class _named_errors:
    """Turns the bare KeyError of a tensor that peft looks for into an error that names the file."""

    def __init__(self, source: str) -> None:
        self.source = source

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Replace a KeyError."""
        if isinstance(error, KeyError):
            raise ValueError(
                f"The weights of {self.source} lack {error}, which the model has a place for. The file is incomplete, "
                "or was saved for another base model. Nothing has been changed."
            ) from error


FRAMES: tuple[tuple[type, str, Frame], ...] = (
    (PeftModel, "from_pretrained", _new_model),
    (PeftModel, "load_adapter", _further_adapter),
    (PeftModel, "save_pretrained", _save),
    (PeftModel, "set_adapter", _switch("set_adapter")),
    (PeftAdapterMixin, "load_adapter", _transformers_adapter),
    (PeftAdapterMixin, "add_adapter", _add_transformers),
    (PeftAdapterMixin, "set_adapter", _switch("set_adapter")),
    (PeftAdapterMixin, "enable_adapters", _switch("enable_adapters")),
    (PeftAdapterMixin, "disable_adapters", _switch("disable_adapters")),
    (PeftAdapterMixin, "delete_adapter", _switch("delete_adapter")),
    (PreTrainedModel, "save_pretrained", _save_transformers),
)
