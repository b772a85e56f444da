"""Weights are compared with what an adapter has before anything is loaded; the ways in are in test_entries."""

from __future__ import annotations

import pytest

from moe_peft import RoutedConfig
from moe_peft.config.adapter_files import AdapterFile
from moe_peft.tuner.incoming import Incoming, announced, check_incoming, current
from tests.tiny import tiny_llama

OWN = {"x.routed_experts.A": (3, 2, 8), "x.routed_router.weight": (3, 8)}


def incoming(shapes, bare_keys=False, **fields):
    return Incoming(AdapterFile("file", shapes, **fields), "folder", "a", bare_keys=bare_keys)


def check(one, config=None):
    check_incoming(one, config or RoutedConfig(num_experts=3, r=2), "routed_", OWN, tiny_llama())


def test_keys_have_the_prefix_of_peft_or_may_go_without():
    with_prefix = {f"base_model.model.{key}": shape for key, shape in OWN.items()}
    check(incoming(with_prefix))
    check(incoming(with_prefix, bare_keys=True))
    check(incoming(OWN, bare_keys=True))
    with pytest.raises(ValueError, match="lack 2 of 2 tensors"):
        check(incoming(OWN))


def test_integers_and_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"integers or complex numbers in \['x.routed_router.weight'\]"):
        check(incoming(OWN, bare_keys=True, integers=frozenset(["x.routed_router.weight"])))
    with pytest.raises(ValueError, match=r"shape \(3, 9\), but this model needs \(3, 8\)"):
        check(incoming({**OWN, "x.routed_router.weight": (3, 9)}, bare_keys=True))


def test_weights_are_announced_to_an_adapter_of_their_name_and_no_longer_than_the_block():
    one = incoming(OWN)
    with pytest.raises(KeyError), announced(one):
        assert current("a") is one and current("b") is None
        raise KeyError
    assert current("a") is None
