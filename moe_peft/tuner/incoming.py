"""The weights that an operation is about to load, and what they must be: checked before a module or value changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..config.adapter_files import AdapterFile
from ..config.config import MoeConfig
from ..config.stamp import check_meaning, saved_embeddings, saved_meaning
from ..messages import shown
from .tensors import PEFT_PREFIX, TOKENS, Shapes, base_key, further_tensors


@dataclass(frozen=True)
class Incoming:
    """Weights that are about to be loaded.

    Attributes:
        file: Header of the file, with its keys as peft will use them.
        source: Folder or name that was given.
        adapter_name: Name to load them under.
        bare_keys: Whether keys may lack the prefix that `PeftModel` gives them.
        meaning: What the adapter_config.json beside them says that they mean, where it is not itself the
            configuration that is loaded.
    """

    file: AdapterFile
    source: str
    adapter_name: str
    bare_keys: bool = False
    meaning: Mapping[str, Any] | None = field(default=None)


_INCOMING: ContextVar[Incoming | None] = ContextVar("moe_peft_incoming", default=None)


def current(adapter_name: str | None) -> Incoming | None:
    """The weights that are about to be loaded under a name; None when an adapter is made anew.

    Args:
        adapter_name: The name.
    """
    incoming = _INCOMING.get()
    return incoming if incoming is not None and incoming.adapter_name == adapter_name else None


@contextmanager
def announced(incoming: Incoming) -> Iterator[None]:
    """Let the tuner know during the block what the adapter that it injects will be filled with.

    Args:
        incoming: The weights.
    """
    token = _INCOMING.set(incoming)
    try:
        yield
    finally:
        _INCOMING.reset(token)


def check_incoming(incoming: Incoming, config: MoeConfig, prefix: str, own: Shapes, model: nn.Module) -> None:
    """Refuse weights that are not all of an adapter's own, of its shapes, and with its meaning.

    Args:
        incoming: The weights.
        config: The adapter's configuration, resolved for the model.
        prefix: What the attributes of its type begin with.
        own: The adapter's tensors.
        model: The model, in a `PeftModel` or not, with or without the adapter.

    Raises:
        ValueError: Tensors are missing, foreign, of the base model, of another shape or kind, or mean something else.
    """
    file = incoming.file
    whose = f"the adapter {shown(incoming.adapter_name)}"
    meaning = saved_meaning(file) or incoming.meaning
    if meaning is not None:
        check_meaning(file.name, meaning, config.meaning(), whose)
    keys = {_inner_key(key, incoming.bare_keys): key for key in file.shapes}
    further = further_tensors(model, config)
    tokens = {key for key in keys if key.endswith(TOKENS)} if config.trainable_token_indices is not None else set()
    foreign = [key for key in keys if key not in own and base_key(key) not in further and key not in tokens]
    wanted = {**own, **further}
    found = {key if key in own else base_key(key): file.shapes[keys[key]] for key in keys}
    _refuse_missing(file, wanted, found, lacks_tokens=config.trainable_token_indices is not None and not tokens)
    _refuse_foreign(file, [keys[key] for key in foreign], prefix, model)
    for key, shape in wanted.items():
        if found[key] != shape:
            raise ValueError(
                f"The adapter's tensor {key} has the shape {found[key]}, but this model needs {shape}. It was saved "
                "for a base model of other widths, or with another r or num_experts. No weight has been changed."
            )
    integers = sorted(keys[key] for key in own if keys[key] in file.integers)
    if integers:
        raise ValueError(
            f"{file.name} holds integers or complex numbers in {shown(integers)}, where an adapter has floating point "
            "numbers. The file is damaged; save the adapter again. No weight has been changed."
        )


def _inner_key(key: str, bare_keys: bool) -> str:
    inner = key.removeprefix(PEFT_PREFIX)
    return inner if bare_keys or inner != key else f"\0{key}"


def _refuse_missing(file: AdapterFile, wanted: Shapes, found: Shapes, lacks_tokens: bool) -> None:
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        raise ValueError(
            f"The adapter's weights lack {len(missing)} of {len(wanted)} tensors, the first is {missing[0]}. "
            f"{file.name} is incomplete, or it was saved for another base model or other target_modules. No weight "
            "has been changed."
        )
    if lacks_tokens:
        raise ValueError(
            f"{file.name} lacks the trained embeddings of trainable_token_indices (...{TOKENS}). It is incomplete. No "
            "weight has been changed."
        )


def _refuse_foreign(file: AdapterFile, foreign: list[str], prefix: str, model: nn.Module) -> None:
    extra = sorted(key for key in foreign if f".{prefix}" in key)
    if extra:
        raise ValueError(
            f"The adapter's weights hold {len(extra)} tensors more than this model has places for, the first is "
            f"{extra[0]}. It was saved for a base model of more layers, or for other modules. No weight has been "
            "changed."
        )
    embeddings = embedding_names(model)
    allowed = {key for key in saved_embeddings(file) if _bare(key.removeprefix(PEFT_PREFIX)) in embeddings}
    base = sorted(set(foreign) - allowed)
    if base:
        raise ValueError(
            f"{file.name} holds {len(base)} tensors that are not the adapter's, the first is {shown(base[0])}; "
            "loading would write them into the base model. Take them out of the file. No weight has been changed."
        )


def _bare(key: str) -> str:
    """The name that a weight of an embedding has without what peft puts around it."""
    for wrapper in (".token_adapter.", ".modules_to_save.", ".original_module."):
        key = key.replace(wrapper, ".")
    return base_key(key)


def embedding_names(model: nn.Module) -> set[str]:
    """Names of the weights of a model's input and output embeddings."""
    found = set()
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        layer = getattr(model, getter, lambda: None)()
        if layer is None:
            continue
        names = [name for name, module in model.named_modules(remove_duplicate=False) if module is layer]
        found |= {base_key(f"{name}.{own}".removeprefix(PEFT_PREFIX)) for name in names for own in layer.state_dict()}
    return found
