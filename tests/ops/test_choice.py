"""The choice among ops: by the work each would do, the one that runs, and what a field forces."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import get_peft_model

from moe_peft import PerftConfig, RoutedConfig, describe
from moe_peft.experts import LowRankExperts
from moe_peft.experts import low_rank as module
from moe_peft.ops import AUTO, IMPLEMENTATIONS, Work, choose, few_stay_dense
from tests.compare import random_routing
from tests.contract.cases import randomize, tiny_olmoe
from tests.tiny import padded_batch, tiny_llama

BIG = Work(
    num_tokens=256,
    num_experts=64,
    num_slots=2,
    r=16,
    dtype=torch.float32,
    device_type="cpu",
)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "grouped"),
        ({"num_tokens": 100_000}, "grouped"),
        ({"num_tokens": 2048, "dtype": torch.bfloat16}, "grouped"),
        ({"num_tokens": 1}, "gather"),
        ({"num_tokens": 1, "num_experts": 8}, "dense"),
        ({"num_tokens": 0}, "dense"),
        ({"num_slots": 64}, "dense"),
        ({"num_tokens": 1, "num_slots": 64}, "dense"),
        ({"num_experts": 8, "r": 4}, "dense"),
        ({"num_experts": 8, "r": 8}, "dense"),
        ({"num_experts": 8, "r": 9}, "grouped"),
        ({"dtype": torch.float64, "num_tokens": 2048}, "grouped"),
        ({"num_tokens": 2048, "compiling": True}, "grouped"),
        ({"num_tokens": 1, "compiling": True}, "grouped"),
        ({"device_type": "cuda", "num_tokens": 4096, "dtype": torch.bfloat16}, "grouped"),
        ({"device_type": "cuda", "num_tokens": 4096}, "dense"),
        ({"device_type": "cuda", "num_tokens": 4096, "dtype": torch.bfloat16, "r": 8}, "dense"),
        ({"device_type": "cuda", "num_tokens": 1, "dtype": torch.bfloat16}, "gather"),
    ],
)
def test_the_choice_follows_from_the_work(changes, expected):
    assert choose(replace(BIG, **changes)) == expected
    assert expected in IMPLEMENTATIONS


def spied(monkeypatch):
    """Replace every op by itself and a note of its name."""
    ran: list[str] = []

    def noting(name, op):
        def run(*args, **kwargs):
            ran.append(name)
            return op(*args, **kwargs)

        return run

    monkeypatch.setattr(module, "IMPLEMENTATIONS", {name: noting(name, op) for name, op in IMPLEMENTATIONS.items()})
    return ran


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "r", "expected"),
    [(63, 64, 4, "grouped"), (1, 64, 4, "gather"), (13, 4, 4, "dense"), (4000, 64, 4, "grouped")],
)
def test_the_op_that_is_chosen_is_the_one_that_runs(monkeypatch, num_tokens, num_experts, r, expected):
    ran = spied(monkeypatch)
    sizes = {"num_experts": num_experts, "r": r, "scaling": 1.0, "init_weights": False}
    banks = {name: LowRankExperts(256, 1024, experts_implementation=name, **sizes) for name in (AUTO, "dense")}
    banks["dense"].load_state_dict(banks[AUTO].state_dict())
    routing = random_routing(num_tokens, num_experts, 2)
    x, base = torch.randn(num_tokens, 256), torch.randn(num_tokens, 1024)
    found = banks[AUTO](x, base, routing)
    assert ran == [expected] == [banks[AUTO].implementation(num_tokens, 2)]
    torch.testing.assert_close(found, banks["dense"](x, base, routing), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("method", ["linear", "perft-e"])
def test_a_field_forces_an_op_and_all_give_the_same(monkeypatch, method, name):
    ran = spied(monkeypatch)
    batch, results = padded_batch([9, 6]), []
    for implementation in (name, AUTO):
        if method == "linear":
            base, config = tiny_llama(), RoutedConfig(num_experts=16, r=8, experts_implementation=implementation)
        else:
            base, config = tiny_olmoe(), PerftConfig(variant="E", r=8, experts_implementation=implementation)
        assert type(config).from_pretrained is not None and config.experts_implementation == implementation
        model = get_peft_model(base, config)
        randomize(model)
        ran.clear()
        results.append(model.eval()(**batch).logits)
        if implementation == name and (name != "dense" or method == "perft-e"):
            assert set(ran) == {name}
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_a_description_says_what_is_chosen():
    wide = describe(tiny_llama(), RoutedConfig(num_experts=64, r=16))
    assert wide.implementations == {2048: ["grouped"], 1: ["gather"]}
    assert "routed sums: grouped for 2,048 tokens; gather for 1 token\n" in str(wide)
    assert describe(tiny_llama(), RoutedConfig(num_experts=4, r=4)).implementations == {2048: ["dense"], 1: ["dense"]}
    forced = describe(tiny_llama(), RoutedConfig(num_experts=64, r=16, experts_implementation="eager"))
    assert forced.implementations == {2048: ["eager"], 1: ["eager"]}


@pytest.mark.parametrize(("num_tokens", "num_slots", "r"), [(0, 2, 64), (1, 2, 2), (8, 2, 2), (9, 2, 2), (1, 2, 64)])
def test_few_slots_of_few_ranks_are_what_the_choice_makes_of_them(num_tokens, num_slots, r):
    num_experts = 64
    work = Work(num_tokens, num_experts, num_slots, r, torch.float32, "cpu")
    if few_stay_dense(num_tokens, num_slots, num_experts * r):
        assert choose(work) == choose(replace(work, device_type="cuda")) == "dense"
    else:
        assert num_tokens * num_slots > 16 or num_experts * r > 128
