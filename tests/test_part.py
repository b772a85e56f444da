"""What a part says of itself: nothing is promised beyond one token and one row, and an option knows what fits."""

from __future__ import annotations

import inspect

import pytest

from moe_peft import extend
from moe_peft.part import ModulePart, Option, Part


def test_a_part_that_says_nothing_can_neither_be_merged_nor_give_anything():
    assert not ModulePart.mergeable and not ModulePart.keeps_float32 and ModulePart.frozen == ()
    assert not (Part.gives or Part.needs or Part.context_needs or Part.fields or Part.options)
    assert Part.misfit({}, {}) is None and not Part.known_groups({})


@pytest.mark.parametrize(("value", "fits"), [(0.5, True), (2, False), ("a", False), (None, False), ([], False)])
def test_a_value_that_cannot_be_compared_does_not_fit(value, fits):
    assert Option("p", 0.1, "a number from 0 to 1", lambda v: 0 <= v <= 1).accepts(value) is fits


PARTS = {
    f"{room}/{name}": part
    for room, registry in (
        ("scorers", extend.SCORERS),
        ("gates", extend.GATES),
        ("selectors", extend.SELECTORS),
        ("routers", extend.ROUTERS),
        ("experts", extend.EXPERTS),
        ("losses", extend.LOSSES),
    )
    for name, part in registry.items()
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_a_constructor_names_every_field_and_option_that_its_part_declares_and_swallows_no_other(part):
    named: set[str] = set()
    # A field of a base that the part does not declare is one that the part settles itself.
    settled = {field for own in part.__mro__ for field in getattr(own, "fields", ())} - {*part.fields}
    required: dict[str, int] = {"unheard_of": 1}
    for own in (own for own in part.__mro__ if "__init__" in vars(own)):
        # What a constructor hands on, the next one names.
        parameters = list(inspect.signature(own.__init__).parameters.values())[1:]
        free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        named |= {parameter.name for parameter in parameters if parameter.kind not in free}
        needed = [p.name for p in parameters if p.default is p.empty and p.kind not in free]
        required |= {name: 1 for name in needed if name not in settled}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    assert {*part.fields, *(option.name for option in part.options)} <= named
    with pytest.raises(TypeError, match=r"unheard_of|takes no arguments"):
        part(**required)
