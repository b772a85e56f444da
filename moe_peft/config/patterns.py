"""Regular expressions in configurations: refused where they are broken, or where trying them would take for ever.

A configuration may come from a file of somebody else's, so the ways in which `re` may try its patterns are counted
first (see `pattern_ways`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND

from ..messages import shown
from .pattern_ways import TooManyWaysError, count_ways, is_simple, probes, sre_parse

# Ways that `re` may try on all names of a model together: parts of a second.
MAX_WAYS_OF_ALL = 3_000_000
MAX_LENGTH = 2_000
# Names that are tried when a configuration is made, before there is a model.
USUAL_NAMES = ("model.language_model.layers.10.self_attn.q_proj", "transformer.encoder.block.11.layer.1.mlp.dense_h")

# Metadata of fields that hold patterns, see `pattern_fields`; the templates are peft's.
NAMES_OR_PATTERN = {"pattern": "{}"}
LISTS_IN_NAMES = {"pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.", "patterns_in_lists": True}
PARTS_OF_NAMES = {"pattern": r"(^|.*\.){}($|\..*)", "patterns_in_lists": True}


def pattern_fields(config: Any) -> Iterator[tuple[str, str, str]]:
    """The regular expressions in a configuration, as peft puts them together.

    A field holds some where its metadata has a "pattern", the template that a value is put into. Of a list every item,
    and of a dict every key, is one where the metadata says `"patterns_in_lists": True`, and none elsewhere. A field
    that a subclass declares anew holds the same.

    Args:
        config: A dataclass.

    Yields:
        Field name, what was written, and the expression.
    """
    for field in dataclasses.fields(config):
        metadata = _metadata(type(config), field.name)
        template, value = metadata.get("pattern"), getattr(config, field.name)
        if template is None or not value:
            continue
        if isinstance(value, str):
            if value.lower() != INCLUDE_LINEAR_LAYERS_SHORTHAND:
                yield field.name, value, template.replace("{}", value)
        elif metadata.get("patterns_in_lists", False):
            for item in value:
                yield field.name, item, template.replace("{}", item)


def _metadata(cls: type, name: str) -> Mapping[str, Any]:
    """What is said of a field by the nearest class that says which patterns it holds."""
    declared = (getattr(base, "__dataclass_fields__", {}).get(name) for base in cls.__mro__)
    return next((own.metadata for own in declared if own is not None and "pattern" in own.metadata), {})


def check_patterns(config: Any, names: Iterable[str] | None = None) -> None:
    """Refuse regular expressions that are broken or would take too long.

    Args:
        config: A configuration.
        names: Names that they will be tried on; None tries typical ones, and ones made of the pattern's own letters.

    Raises:
        ValueError: One of them is; the message names the field and the value.
    """
    tried = None if names is None else list(names)
    for field, written, pattern in pattern_fields(config):
        problem = _problem(written, pattern, None if tried is None else tuple(tried))
        if problem is not None:
            raise ValueError(
                f"{type(config).__name__}: {field}={shown(written)} is a regular expression {problem}. Write one that "
                "Python's re can match, with few repeated parts and none inside another, as "
                r"r'.*\.layers\.(0|1)\..*_proj', or a list of names."
            )


@lru_cache(maxsize=256)
def _problem(written: str, pattern: str, names: tuple[str, ...] | None) -> str | None:
    """What is wrong with what was written, or with the pattern that it is put into; None where nothing is."""
    if len(pattern) > MAX_LENGTH:
        return f"of {len(written)} characters, more than {MAX_LENGTH}"
    try:
        re.compile(written)
        re.compile(pattern)
        parsed = sre_parse.parse(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"that is broken ({shown(str(error))})"
    if is_simple(parsed):
        return None
    total = 0.0
    for name in names if names is not None else [*USUAL_NAMES, *probes(parsed)]:
        try:
            total += count_ways(parsed, name)
        except (TooManyWaysError, RecursionError):
            return f"that would take too long on names as {shown(name)}"
        if total > MAX_WAYS_OF_ALL:
            return "that would take too long on the names of this model"
    return None
