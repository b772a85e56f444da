"""Options of parts reach the parts: from Python, from a file, and refused by name where no part has them."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from moe_peft import RoutedConfig
from moe_peft.experts import EXPERTS, LowRankExperts
from moe_peft.losses import LOSSES, LoadBalancing
from moe_peft.part import Option
from moe_peft.place import Place
from moe_peft.routers import GATES
from moe_peft.routers.gates import Softmax
from tests.tiny import tiny_llama


class Tempered(Softmax):
    """softmax(z / tau)."""

    options = (Option("tau", 1.0, "a positive number", lambda value: 0 < value < 1e6),)

    def __init__(self, *, tau: float, **values):
        super().__init__(**values)
        self.tau = tau


class Counted(LowRankExperts):
    """Low-rank experts with a note."""

    options = (Option("note", "none", "a string", lambda value: isinstance(value, str)),)

    def __init__(self, *sizes, note: str, **values):
        super().__init__(*sizes, **values)
        self.note = note


class Powered(LoadBalancing):
    """Load balancing with a number of its own."""

    options = (Option("power", 2, "a whole number", lambda value: type(value) is int),)

    def __init__(self, *, power: int):
        self.power = power


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for name, gate in {"tempered": Tempered, "over_tokens": OverTokens, "over_rows": OverRows}.items():
        monkeypatch.setitem(GATES, name, gate)
    monkeypatch.setitem(EXPERTS, "counted", Counted)
    monkeypatch.setitem(LOSSES, "powered", Powered)


class OverTokens(Softmax):
    """A softmax over the tokens of a batch."""

    causal = False


class OverRows(Softmax):
    """A softmax that looks at other rows."""

    batch_invariant = False


FIELDS = {"gate": "tempered", "experts": "counted", "router_args": {"tau": 0.5}, "experts_args": {"note": "mine"}}
FIELDS |= {"losses": {"powered": {"weight": 0.25, "power": 3}, "gshard_load_balancing": 0.5}}


@pytest.mark.parametrize("saved", [False, True])
def test_options_reach_their_parts(saved, tmp_path):
    config = RoutedConfig(**FIELDS)
    if saved:
        config.save_pretrained(tmp_path)
        config = RoutedConfig.from_pretrained(tmp_path)
        assert config.to_dict() == RoutedConfig(**FIELDS).to_dict()
    with torch.device("meta"):
        parts = config.build(Place("any", 8, 8))
    assert parts.router.gate.tau == 0.5 and parts.experts.note == "mine"
    assert parts.objective.losses["powered"].power == 3
    assert parts.objective.coefficients["powered"] == 0.25
    assert parts.objective.coefficients["gshard_load_balancing"] == 0.5


def test_defaults_hold_where_nothing_is_given_and_options_are_part_of_the_meaning():
    config = RoutedConfig(gate="tempered", experts="counted")
    with torch.device("meta"):
        parts = config.build(Place("any", 8, 8))
    assert (parts.router.gate.tau, parts.experts.note) == (1.0, "none")
    assert config.meaning() != RoutedConfig(gate="tempered", experts="counted", router_args={"tau": 2}).meaning()
    assert config.meaning() == RoutedConfig(gate="tempered", experts="counted", losses={"powered": 1.0}).meaning()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router_args": {"tua": 1}, "gate": "tempered"}, "router_args: 'tua' is no option .*; they have 'tau'"),
        ({"router_args": {"tau": 1}}, "they have none, so leave it None"),
        ({"router_args": {"tau": -1}, "gate": "tempered"}, "router_args: tau=-1 must be a positive number"),
        ({"experts_args": {"note": 5}, "experts": "counted"}, "experts_args: note=5 must be a string"),
        ({"losses": {"powered": {"power": 2}}}, "weights that are zero or positive numbers"),
        ({"losses": {"powered": {"weight": "x"}}}, "weights that are zero or positive numbers"),
        ({"losses": {"powered": {"weight": 1, "p": 2}}}, r"losses\['powered'\]: 'p' is no option"),
        ({"losses": {"powered": {"weight": 1, "power": 2.5}}}, "power=2.5 must be a whole number"),
        ({"router_args": {"tau": float("nan")}, "gate": "tempered"}, "must be a dict from strings to values of JSON"),
        ({"gate": ["softmax"]}, "gate=.* must be a string"),
        ({"scorer": "x" * 1000}, "must be one of 'linear'"),
    ],
)
def test_what_no_part_takes_is_refused_before_a_model_is_changed(fields, message):
    base = tiny_llama()
    with pytest.raises(ValueError, match=f"^RoutedConfig: .*{message}") as error:
        get_peft_model(base, RoutedConfig(**fields))
    assert len(str(error.value)) < 700


@pytest.mark.parametrize(
    ("gate", "reason"), [("over_tokens", "a later token changes"), ("over_rows", "other rows change")]
)
def test_a_part_that_is_not_safe_in_a_causal_model_is_refused_there_unless_allowed(gate, reason):
    with pytest.raises(
        ValueError, match=f"router='top_k' must be another one .* allow_non_causal=True: with Over.* {reason}"
    ):
        RoutedConfig(gate=gate, task_type="CAUSAL_LM")
    assert RoutedConfig(gate=gate, task_type="CAUSAL_LM", allow_non_causal=True).gate == gate
    assert RoutedConfig(gate=gate, task_type="TOKEN_CLS").gate == RoutedConfig(gate=gate).gate == gate
