"""The flags of the adapter: one for every field of every adapter type's configuration, with the prefix `moe_`.

They are made from the configurations themselves, so that a field has its flag, its type and its help from one place.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from baselines import BASELINES

from moe_peft.config.field_types import LISTS, MAPPINGS, field_types
from moe_peft.config.stored import unannotated
from moe_peft.experts import EXPERTS
from moe_peft.messages import shown
from moe_peft.methods import METHODS

PREFIX = "moe_"
# What `moe_method` takes: adapter types, and what they are compared with.
CONFIGS: dict[str, type[Any]] = {**METHODS, **BASELINES}
METHOD_FLAG = f"{PREFIX}method"
# Fields that a user does not choose: fixed by the scripts or by peft, or filled in from the model.
WITHOUT_FLAG = frozenset(
    {
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "schema_version",
        "num_backbone_experts",
    }
)
# Where the flag takes something else than the field.
HELP = {
    "experts": f"Expert kind ({', '.join(EXPERTS)}), or the expert_config.json of train/select_experts.py.",
    "init_weights": "'gaussian', or 'true' for uniform A.",
    "target_modules": "Linear layers to adapt, or all-linear; default: the method's places.",
    "group_column": "Data column with the group of each sample, for localized balancing.",
}


@dataclass
class ScriptFlags:
    """Flags about the adapter that are no fields of it."""

    moe_method: str = field(
        default=next(iter(METHODS)),
        metadata={
            "help": "Adapter type; lora is stock LoRA, and none trains every weight of the model.",
            "choices": [*sorted(METHODS), *BASELINES],
        },
    )
    moe_import: list[str] | None = field(
        default=None,
        metadata={"help": "Files or modules with parts or methods of your own, which are imported first."},
    )
    moe_router_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the routers; default: learning_rate."}
    )
    moe_lora_plus_ratio: float | None = field(
        default=None, metadata={"help": "Learning rate of the experts' up matrices over learning_rate (LoRA+)."}
    )
    moe_quantize_experts: bool = field(
        default=True, metadata={"help": "With load_in_4bit: quantize fused experts too, not linear layers alone."}
    )
    moe_overwrite: bool = field(
        default=False,
        metadata={"help": "Delete what an earlier run left in output_dir, instead of keeping it in a folder beside."},
    )


def owners() -> dict[str, dict[str, dataclasses.Field]]:
    """Field name -> method -> the field, of all adapter types that have it."""
    found: dict[str, dict[str, dataclasses.Field]] = {}
    for method, config in CONFIGS.items():
        for own in dataclasses.fields(config):
            if own.name not in WITHOUT_FLAG:
                found.setdefault(own.name, {})[method] = own
    return found


def kinds_of(name: str, method: str) -> tuple[Any, ...]:
    """Types that a field may have, without None.

    Args:
        name: The field.
        method: Whose.
    """
    kind = field_types(CONFIGS[method])[name]
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return tuple(unannotated(member) for member in members if member is not NoneType)


def takes_mapping(name: str, method: str) -> bool:
    """Whether a field is a mapping and nothing else, which a command line gives as JSON.

    Args:
        name: The field.
        method: Whose.
    """
    if name not in field_types(CONFIGS[method]):
        return False
    return all(get_origin(kind) in MAPPINGS or kind is dict for kind in kinds_of(name, method))


def methods_of_selections() -> list[str]:
    """The adapter types that train experts which a selection names, the first one first."""
    return [method for method in METHODS if takes_mapping("experts", method)]


def flag_type(name: str, methods: list[str]) -> Any:
    """Type of a field's flag: what a command line can say of it.

    Args:
        name: The field.
        methods: Adapter types that have it.

    Returns:
        `list[...]`, `bool`, `int`, `float`, or `str`, which also carries mappings, as JSON; each or None.
    """
    kinds = [kind for method in methods for kind in kinds_of(name, method)]
    for kind in kinds:
        if get_origin(kind) in LISTS or get_origin(kind) is tuple or kind in (list, tuple, set, frozenset):
            inner = {_plain(own) for own in get_args(kind) if own is not ...}
            return list[inner.pop() if len(inner) == 1 else str] | None  # type: ignore[misc]
    plain = {_plain(kind) for kind in kinds}
    return next(own for own in (str, float, int, bool) if own in plain) | None


def _plain(kind: Any) -> type:
    """The type by which a command line says a single value."""
    if get_origin(kind) is Literal:
        kind = type(get_args(kind)[0])
    elif isinstance(kind, type) and issubclass(kind, Enum):
        kind = type(next(iter(kind)).value)
    return kind if kind in (str, float, int, bool) else str


def read_mapping(flag: str, value: Any) -> Any:
    """Read a mapping that was given as JSON on a command line; one of a YAML file is there already.

    Args:
        flag: Name of the flag, for the message.
        value: What was given.

    Raises:
        ValueError: It is no JSON object.
    """
    if not isinstance(value, str):
        return value
    try:
        read = json.loads(value)
    except (ValueError, RecursionError):
        read = None
    if not isinstance(read, dict):
        raise ValueError(
            f"--{flag} {shown(value)} is no mapping in JSON. Write it in quotes, as --{flag} "
            "'{\"name\": 0.1}', or as a mapping in the YAML file."
        )
    return read


def help_of(name: str, fields: dict[str, dataclasses.Field]) -> str:
    """Help of a field's flag: what it is, whose it is, and each method's default.

    Args:
        name: The field.
        fields: Method -> the field.
    """
    text = HELP.get(name) or next(iter(fields.values())).metadata.get("help", "")
    methods = "" if fields.keys() >= METHODS.keys() else f" Methods: {', '.join(fields)}."
    defaults: dict[str, list[str]] = {}
    for method, own in fields.items():
        if own.default not in (None, dataclasses.MISSING):
            defaults.setdefault(str(own.default), []).append(method)
    if len(defaults) == 1:
        said = f" Default: {next(iter(defaults))}."
    else:
        said = "".join(f" Default of {', '.join(names)}: {value}." for value, names in defaults.items())
    return (text + methods + range_of(name, fields) + said).replace("%", "%%")


def range_of(name: str, fields: dict[str, dataclasses.Field]) -> str:
    """What a number must be, in the words with which a configuration refuses another one; nothing for other fields.

    Args:
        name: The field.
        fields: Method -> the field.
    """
    for method in fields:
        if not set(kinds_of(name, method)) <= {int, float}:
            continue
        try:
            CONFIGS[method](**{name: -1})
        except ValueError as error:
            said = re.search(rf": {name}=-1 must be (.*)\.$", str(error))
            if said and "left at" not in said[1]:
                return f" Must be {re.sub(r'(num_experts|r)=[0-9]+', lambda found: found[1], said[1])}."
    return ""


def group_of(flag: str) -> str:
    """What a flag describes: the group of fields that declares it, or the methods that alone have it.

    Args:
        flag: Its name, with the prefix.
    """
    name = flag.removeprefix(PREFIX)
    methods = owners()[name]
    own = CONFIGS[next(iter(methods))]
    declaring = [cls for cls in own.__mro__ if name in vars(cls).get("__dataclass_fields__", {})][-1]
    if declaring in CONFIGS.values():
        return f"fields of {', '.join(methods)}"
    said = (declaring.__doc__ or "").partition("\n")[0].rstrip(".")
    return said[:1].lower() + said[1:] if said.startswith("Fields") else "where, and what beside"


def make_flags() -> type:
    """The dataclass of all flags, for the parser; what is not given is None and keeps the method's own default."""
    made = []
    for name, fields in owners().items():
        own = field(default=None, metadata={"help": help_of(name, fields)})
        made.append((PREFIX + name, flag_type(name, list(fields)), own))
    return dataclasses.make_dataclass("MoeArguments", made, bases=(ScriptFlags,), namespace={"__module__": __name__})


def renewed(arguments: type) -> type:
    """The same arguments with flags for what has been registered since they were made.

    Args:
        arguments: A dataclass of flags of the adapter.
    """
    CONFIGS.update(METHODS)
    known = {own.name: own for own in dataclasses.fields(arguments)}
    made = [
        (PREFIX + name, flag_type(name, list(fields)), field(default=None, metadata={"help": help_of(name, fields)}))
        for name, fields in owners().items()
        if PREFIX + name not in known
    ]
    method = known[METHOD_FLAG]
    choices = {**method.metadata, "choices": sorted(CONFIGS)}
    made.append((METHOD_FLAG, str, field(default=method.default, metadata=choices)))
    return dataclasses.make_dataclass(
        arguments.__name__, made, bases=(arguments,), namespace={"__module__": arguments.__module__}
    )


MoeArguments = make_flags()
SCRIPT_FIELDS = frozenset(own.name for own in dataclasses.fields(ScriptFlags)) | {"moe_report"}
