"""Flags of the verbs that start from LoRAs: a router by name, a base model by name."""

from __future__ import annotations

import pytest

from moe_peft.cli.from_loras import load_base, parser_of, router_config
from tests.tools.exported import trained_lora


def given(*words):
    return parser_of("verb", "does").parse_args([*words, "--output", "out"])


def test_flags_name_a_router_and_none_leaves_it_to_the_tool():
    assert router_config(given(), 4) is None
    found = router_config(given("--router", "top_k", "--top_k", "2"), 4)
    assert (found.router, found.top_k, found.norm_topk_prob, found.num_experts) == ("top_k", 2, True, 4)
    assert router_config(given(), 4, directions=True).router_args == {"sign_agnostic": True}


def test_a_lora_without_a_base_model_asks_for_it(tmp_path):
    with pytest.raises(ValueError, match=r"names no base model\. Give it with --base"):
        load_base(given(), str(trained_lora(tmp_path / "one")))
