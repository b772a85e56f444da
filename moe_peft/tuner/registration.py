"""Makes an adapter type known to stock peft: a member of its enum, and an entry in its registry.

peft has no entry point for other packages. A type is a member of `peft.PeftType`, so one is appended to the enum; then
`register_peft_method` accepts it as one of its own. Both steps may be repeated (a module that is imported twice), and
are undone when something does not come out as expected.
"""

from __future__ import annotations

import pickle
from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

from ..backbone.local_experts import offer_loading
from ..messages import shown
from .entries import frame_entries
from .names import check_form
from .sources import ROUTED


class Prefix(str):
    """What an adapter type's attributes begin with; peft asks it first whether it contains a new adapter's name."""

    __slots__ = ()

    def __contains__(self, name: object) -> bool:
        """Refuse a name that is no string with words, as `str` has none that tell what it was asked for."""
        if not isinstance(name, str):
            check_form(name)
        return super().__contains__(name)  # type: ignore[operator]


def extend_peft_type(name: str) -> PeftType:
    """Append a member to `peft.PeftType`, or return the one that is there.

    Call it in the module that defines the configuration class, so that unpickling a configuration finds the member.

    Args:
        name: Upper-case name, which is the member's value too.

    Raises:
        RuntimeError: The enum did not take the member, as with a release of Python that keeps it in another way.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType._member_names_)  # type: ignore[attr-defined]
    # The attribute comes first: once the name is in the member map, the enum refuses to set it.
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    hashable_values = PeftType.__dict__.get("_hashable_values_")
    if hashable_values is not None:
        hashable_values.append(name)
    if not _is_complete(name, member):
        _remove(name, member)
        raise RuntimeError(
            f"peft.PeftType did not accept the adapter type {shown(name)} on this version of Python. "
            "Please report it to peft-moe with the output of `python -VV`."
        )
    return member


def register(config_cls: type, model_cls: type) -> None:
    """Register an adapter type with peft, once.

    Args:
        config_cls: Configuration class; its `adapter_type` is the enum member's name.
        model_cls: Tuner class; its `prefix` is `<type in lower case>_`.

    Raises:
        ValueError: The prefix does not follow from the type, which transformers and peft rely on.
        RuntimeError: Another class has already registered this type.
    """
    name: str = config_cls.adapter_type  # type: ignore[attr-defined]
    prefix: str = model_cls.prefix  # type: ignore[attr-defined]
    if prefix != f"{name.lower()}_":
        raise ValueError(
            f"{model_cls.__name__}.prefix={shown(prefix)} must be {shown(name.lower() + '_')} for type {shown(name)}."
        )
    member = extend_peft_type(name)
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if known is not None:
        if (known.__module__, known.__qualname__) != (config_cls.__module__, config_cls.__qualname__):
            raise RuntimeError(
                f"The adapter type {shown(name)} is already registered by {known.__module__}.{known.__qualname__}. "
                "Uninstall or do not import one of the two packages."
            )
        PEFT_TYPE_TO_CONFIG_MAPPING[member] = config_cls
        PEFT_TYPE_TO_TUNER_MAPPING[member] = model_cls
        ROUTED[name] = config_cls
        return
    try:
        register_peft_method(name=name.lower(), config_cls=config_cls, model_cls=model_cls, prefix=Prefix(prefix))
    except Exception:
        for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING):
            mapping.pop(member, None)
        if PEFT_TYPE_TO_PREFIX_MAPPING.get(member) == prefix:
            del PEFT_TYPE_TO_PREFIX_MAPPING[member]
        _remove(name, member)
        raise
    ROUTED[name] = config_cls
    frame_entries()
    offer_loading()


def _is_complete(name: str, member: Any) -> bool:
    try:
        return (
            PeftType(name) is member
            and PeftType[name] is member
            and getattr(PeftType, name) is member
            and member in list(PeftType)
            and name in list(PeftType)
            and hash(member) == hash(PeftType(name))
            and str(member) == f"PeftType.{name}"
            and pickle.loads(pickle.dumps(member)) is member
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return False


def _remove(name: str, member: Any) -> None:
    PeftType._member_map_.pop(name, None)
    PeftType._value2member_map_.pop(name, None)
    if name in PeftType._member_names_:
        PeftType._member_names_.remove(name)
    hashable_values = PeftType.__dict__.get("_hashable_values_")
    if hashable_values is not None and name in hashable_values:
        hashable_values.remove(name)
    if PeftType.__dict__.get(name) is member:
        type.__delattr__(PeftType, name)
