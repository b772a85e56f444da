"""Evidence knows the fields of a configuration with their values, and the places where a router chooses."""

from __future__ import annotations

from moe_peft.tools.report.evidence import Evidence, names_of
from tests.tools.report.test_advice import CONFIG, place


def test_a_field_is_shown_with_its_value_where_the_configuration_has_it():
    evidence = Evidence([], config=CONFIG)
    assert (
        evidence.has("top_k") and evidence.set_to("top_k") == "top_k=2" and evidence.now("top_k") == " (it is top_k=2)"
    )
    assert not evidence.has("expert_groups") and evidence.now("expert_groups") == ""
    assert not Evidence([]).has("top_k")


def test_a_router_chooses_where_it_tells_tokens_apart_among_several_experts():
    chooses, same = place([5, 5], name="a"), place([5, 5], name="b", spread=0.0)
    others = [same, place([5], name="c"), place([5, 5], name="d", backbone=True)]
    assert names_of(Evidence([chooses, *others]).routed) == ("a",)
