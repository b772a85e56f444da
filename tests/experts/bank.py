"""What the tests of kinds with one down matrix share: a bank in float64, inputs, and its matrices one by one."""

from __future__ import annotations

import torch
from peft import get_peft_model

from moe_peft import RoutedConfig
from tests.compare import assert_same, random_routing
from tests.contract.cases import randomize
from tests.tiny import padded_batch, tiny_llama

D, OUT, E, R, T = 7, 5, 4, 3, 13


def made(kind, **settings):
    """A bank with random matrices, (T, D) input, and (T, O) base output."""
    torch.manual_seed(0)
    bank = kind(D, OUT, num_experts=E, r=R, **{"scaling": 1.7, "init_weights": False, **settings}).double()
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    return bank, x, torch.randn(T, OUT, dtype=torch.float64)


def assert_adds(bank, x, base, matrix) -> None:
    """The bank adds s sum_e g_e matrix(e) x under dense and sparse decisions, in place too."""
    for top_k in (None, 2):
        routing = random_routing(T, E, top_k)
        gates = routing.gate_matrix()
        expected = torch.stack(
            [base[t] + 1.7 * sum(gates[t, e] * (matrix(e) @ x[t]) for e in range(E)) for t in range(T)]
        )
        leaves = [x, routing.logits, *bank.parameters()]
        assert_same(bank(x, base, routing), expected, leaves, leaves, 1e-10)
        assert_same(bank(x, base.clone(), routing, in_place=True), expected, leaves, leaves, 1e-10)
    torch.testing.assert_close(
        bank.delta_weight(torch.arange(E).double()), 1.7 * sum(e * matrix(e) for e in range(E)), rtol=1e-12, atol=1e-12
    )


def assert_merges(experts: str) -> None:
    """Under constant weights the merged model equals the adapted one."""
    config = RoutedConfig(router="constant", experts=experts, num_experts=3, r=2)
    model, batch = get_peft_model(tiny_llama(), config).double().eval(), padded_batch([5, 3])
    randomize(model)
    with torch.no_grad():
        before = model(**batch).logits
        torch.testing.assert_close(model.merge_and_unload()(**batch).logits, before, rtol=1e-9, atol=1e-9)
