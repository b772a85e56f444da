"""Vector experts against a loop over tokens, heads and vectors, forward and gradient."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from moe_peft.experts import VectorExperts
from moe_peft.ops.choice import FEW_ROWS
from moe_peft.types import Routing
from tests.compare import assert_same, gates_of, random_routing


def bank_of(width: int, num_experts: int, num_heads: int = 1, **fields) -> VectorExperts:
    return VectorExperts(3, width, num_experts=num_experts, num_heads=num_heads, init_weights=False, **fields).double()


def loop(u: torch.Tensor, vectors: torch.Tensor, gates: list[dict[int, torch.Tensor]], heads: int) -> torch.Tensor:
    """u_t,h * (1 + sum_e g_th,e (l_e,h - 1)), one decision for each head of each token."""
    rows, width = [], u.shape[1] // heads
    for t in range(u.shape[0]):
        parts = []
        for h in range(heads):
            own = slice(h * width, (h + 1) * width)
            scale = torch.ones(width, dtype=u.dtype)
            for e, gate in gates[t * heads + h].items():
                scale = scale + gate * (vectors[e, own] - 1)
            parts.append(u[t, own] * scale)
        rows.append(torch.cat(parts))
    return torch.stack(rows) if rows else u.clone()


@pytest.mark.parametrize("num_tokens", [0, 1, 13])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, None), (5, None), (5, 1), (5, 2), (5, 5)])
@pytest.mark.parametrize("heads", [1, 3])
def test_scaling_equals_the_loop(num_tokens, num_experts, top_k, heads):
    bank = bank_of(12, num_experts, heads)
    u = torch.randn(num_tokens, 12, dtype=torch.float64, requires_grad=True)
    unused = 2 if top_k in (1, 2) else None
    routing = random_routing(num_tokens * heads, num_experts, top_k, unused=unused)
    leaves = [u, bank.vectors, routing.logits]
    assert_same(bank(None, u, routing), loop(u, bank.vectors, gates_of(routing), heads), leaves, leaves)


@pytest.mark.parametrize("heads", [1, 3])
def test_many_rows_that_are_kept_in_another_form_equal_the_loop(heads):
    test_scaling_equals_the_loop(FEW_ROWS + 1, 2, None, heads)


def test_second_derivatives_are_right():
    bank, routing = bank_of(4, 3, 2), random_routing(6, 3)
    u = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def scaled(u, vectors, logits):
        fresh = Routing(weights=logits.softmax(-1), experts=None, logits=logits, probs=logits.softmax(-1))
        return torch.func.functional_call(bank, {"vectors": vectors}, (None, u, fresh))

    vectors = bank.vectors.detach().requires_grad_()
    assert torch.autograd.gradgradcheck(scaled, (u, vectors, routing.logits.detach().requires_grad_()))


@pytest.mark.parametrize("frozen", ["u", "vectors", "gates"])
def test_a_frozen_operand_changes_no_other_gradient(frozen):
    bank, routing = bank_of(6, 3), random_routing(5, 3)
    u = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    leaves = {"u": u, "vectors": bank.vectors, "gates": routing.logits}
    bank(None, u, routing).square().sum().backward()
    expected = {name: leaf.grad.clone() for name, leaf in leaves.items()}
    for leaf in leaves.values():
        leaf.grad = None
    leaves[frozen].requires_grad_(False)
    again = random_routing(5, 3)
    again.logits.requires_grad_(frozen != "gates")
    probs = again.logits.softmax(-1)
    bank(None, u, Routing(weights=probs, experts=None, logits=again.logits, probs=probs)).square().sum().backward()
    leaves["gates"] = again.logits
    for name, leaf in leaves.items():
        assert (leaf.grad is None) == (name == frozen)
        if name != frozen:
            torch.testing.assert_close(leaf.grad, expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [None, 2])
def test_ones_are_the_identity_bit_for_bit_under_any_weights(dtype, top_k):
    bank = VectorExperts(3, 12, num_experts=5, num_heads=3)
    u = torch.randn(13, 12, dtype=dtype)
    routing = random_routing(39, 5, top_k)
    assert torch.equal(bank(None, u, routing), u)
    assert bank.vectors.eq(1).all()


def test_residual_form_equals_the_plain_one_under_soft_weights():
    bank, routing = bank_of(12, 5), random_routing(13, 5)
    u = torch.randn(13, 12, dtype=torch.float64)
    torch.testing.assert_close(bank(None, u, routing), u * (routing.weights @ bank.vectors))


def test_output_is_contiguous_and_leaves_its_input_alone():
    bank, routing = bank_of(12, 5, 3), random_routing(39, 5)
    u = torch.randn(13, 12, dtype=torch.float64)
    before = u.clone()
    assert bank(None, u, routing, in_place=True).is_contiguous() and torch.equal(u, before)


def test_sixteen_bit_values_scale_as_in_float32_to_their_rounding():
    bank = VectorExperts(3, 12, num_experts=5, num_heads=3, init_weights=False)
    u, routing = torch.randn(13, 12), random_routing(39, 5)
    found = bank(None, u.bfloat16(), routing)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), bank(None, u.bfloat16().float(), routing), rtol=0.02, atol=0.02)
    expected = bank(None, u, routing)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(bank(None, u, routing), expected)


def test_one_tensor_as_wide_as_the_input_is_saved_for_the_backward_pass():
    num_tokens, width = FEW_ROWS + 1, 96
    bank = VectorExperts(3, width, num_experts=5, num_heads=3, init_weights=False)
    u = torch.randn(num_tokens, width, requires_grad=True)
    routing = random_routing(num_tokens * 3, 5)
    saved: list[torch.Tensor] = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        bank(None, u, routing)
    assert sum(tensor.numel() == num_tokens * width for tensor in saved) == 1
