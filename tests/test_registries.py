"""A registry takes classes of its kind by names, and refuses what is none where it is put in."""

from __future__ import annotations

import pytest

from moe_peft.extend import EXPERTS, GATES, LOSSES, METHODS, ROUTERS, SCORERS, SELECTORS, Softmax, TopK

REGISTRIES = {
    "SCORERS": SCORERS,
    "GATES": GATES,
    "SELECTORS": SELECTORS,
    "ROUTERS": ROUTERS,
    "EXPERTS": EXPERTS,
    "LOSSES": LOSSES,
    "METHODS": METHODS,
}


@pytest.mark.parametrize("name", REGISTRIES)
@pytest.mark.parametrize("value", [lambda routing: routing.probs.sum(), TopK(top_k=1), Softmax(), int, "top_k"])
def test_what_is_no_class_of_the_kind_is_refused_and_the_registry_stays(name, value):
    registry = REGISTRIES[name]
    before = dict(registry)
    with pytest.raises(
        TypeError, match=rf"{name}\['mine'\] = .*register a class that derives from moe_peft.extend.\w+"
    ):
        registry["mine"] = value
    for key in ("", 3, None):
        with pytest.raises(TypeError, match="a name is a text"):
            registry[key] = next(iter(before.values()))
    assert dict(registry) == before


@pytest.mark.parametrize("name", REGISTRIES)
def test_a_registry_is_a_dict_to_which_a_class_is_added_by_its_name(name, monkeypatch):
    registry = REGISTRIES[name]
    cls = next(iter(registry.values()))
    own = type("Mine", (cls,), {})
    monkeypatch.setitem(registry, "mine", own)
    assert isinstance(registry, dict) and registry["mine"] is own and list(registry)[-1] == "mine"
