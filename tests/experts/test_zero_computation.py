"""Low-rank experts beside those without a matrix: the formula by expert, identity at the start, places that fit."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model

from moe_peft import RoutedConfig, routed_layers
from moe_peft.experts.zero_computation import ZeroComputationExperts
from tests.compare import assert_same, random_routing
from tests.contract.cases import randomize
from tests.tiny import padded_batch, tiny_llama

D, E, R, T, SCALING = 6, 3, 2, 13, 1.7
COUNTS = [dict(zip(("zeros", "constants", "copies"), own, strict=True)) for own in ((1, 2, 1), (0, 0, 0), (2, 1, 0))]


def made(out_features=D, **settings):
    torch.manual_seed(0)
    given = {"scaling": SCALING, "init_weights": False, **settings}
    bank = ZeroComputationExperts(D, out_features, num_experts=E, r=R, **given).double()
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    return bank, x, torch.randn(T, out_features, dtype=torch.float64)


def added(bank, e, x):
    """What one expert adds to a token, by the number of its column."""
    if e < E:
        return SCALING * (x @ bank.A[e].T @ bank.B[e])
    e -= E + bank.zeros
    if e < 0:
        return torch.zeros(bank.B.shape[-1]).double()
    if e < bank.constants:
        return (x @ bank.W[e]).sigmoid() * bank.v[e]
    return bank.a[e - bank.constants] * x


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("top_k", [None, 2])
def test_equals_the_formula(counts, top_k):
    bank, x, base = made(**counts)
    routing = random_routing(T, bank.num_choices, top_k)
    gates = routing.gate_matrix()
    rows = [base[t] + sum(gates[t, e] * added(bank, e, x[t]) for e in range(bank.num_choices)) for t in range(T)]
    leaves = [x, routing.logits, *bank.parameters()]
    assert_same(bank(x, base, routing), torch.stack(rows), leaves, leaves)
    assert bank.num_choices == E + sum(counts.values())


def test_it_starts_as_the_identity_bit_for_bit_copies_too():
    bank, x, base = made(init_weights=True, copies=2)
    assert torch.equal(bank(x, base, random_routing(T, bank.num_choices, 2)), base)
    assert bank.up == ("B", "v", "a")


def test_copies_are_refused_where_widths_differ_and_nothing_is_changed():
    model = tiny_llama()
    before = [type(module) for module in model.modules()]
    config = RoutedConfig(experts="zero_computation", experts_args={"copies": 1}, target_modules=["up_proj"])
    with pytest.raises(ValueError, match="copies=1 must be 0 at a place that reads 32 numbers of"):
        get_peft_model(model, config)
    assert [type(module) for module in model.modules()] == before


def test_the_router_decides_among_all_and_files_hold_all(tmp_path):
    options = {"zeros": 1, "constants": 2, "copies": 1}
    config = RoutedConfig(
        experts="zero_computation", experts_args=options, num_experts=3, r=2, target_modules=["q_proj"]
    )
    model, batch = get_peft_model(tiny_llama(), config).eval(), padded_batch([5, 3])
    randomize(model)
    assert all(layer.router["default"].weight.shape[0] == 7 for layer in routed_layers(model))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_groups_of_experts_are_refused_as_they_do_not_name_all_columns():
    with pytest.raises(ValueError, match="which has 2 experts besides"):
        RoutedConfig(
            experts="zero_computation", num_experts=2, expert_groups=[0, 1], losses={"localized_balancing": 0.1}
        )
