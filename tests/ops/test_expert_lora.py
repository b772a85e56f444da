"""The pass in activation space equals experts whose matrices hold their pairs, forward and gradient."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from moe_peft.ops.expert_lora import dense_expert_lora, expert_lora
from moe_peft.ops.expert_rows import PATHS
from moe_peft.ops.expert_stacks import LowRankPairs
from tests.compare import assert_same
from tests.ops.fused import LAYOUTS, D, experts_with_pairs, slots

SIZES = [(1, 1, 1), (1, 2, 4), (13, 2, 4), (63, 3, 4), (13, 4, 4), (5, 1, 4)]
# A loop over slots is for calls without gradients; it has them all the same.
EVERY_PATH = sorted(PATHS)


@pytest.mark.parametrize("path", EVERY_PATH)
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_every_path_equals_the_definition_in_every_layout(path, layout):
    for num_tokens, top_k, num_experts in SIZES:
        experts, factors = experts_with_pairs(layout, num_experts)
        x, index, weights = slots(num_tokens, top_k, num_experts)
        expected = dense_expert_lora(experts, x, index, weights)
        actual = expert_lora(experts, x, index, weights, path)
        assert_same(actual, expected, [x, weights, *factors], [x, weights, *factors])


@pytest.mark.parametrize("path", EVERY_PATH)
@pytest.mark.parametrize("layout", ["joined", "transposed-interleaved-bias", "more-first-matrices"])
def test_slots_without_an_expert_add_nothing_or_their_input(path, layout):
    experts, factors = experts_with_pairs(layout)
    x, index, weights = slots(29, 3, 4, unused=2, beyond=True)
    assert (index >= 4).any() and not (index == 2).any()
    expected = dense_expert_lora(experts, x, index, weights)
    assert_same(
        expert_lora(experts, x, index, weights, path), expected, [x, weights, *factors], [x, weights, *factors]
    )
    nowhere = torch.full_like(index, 4)
    assert_same(
        expert_lora(experts, x, nowhere, weights, path),
        dense_expert_lora(experts, x, nowhere, weights),
        [x, weights, *factors],
        [x, weights, *factors],
    )


@pytest.mark.parametrize("path", EVERY_PATH)
@pytest.mark.parametrize("ids", [(1,), (0, 3), (2,)])
def test_pairs_of_some_experts_equal_zero_pairs_of_the_others(path, ids):
    experts, factors = experts_with_pairs(ids=ids)
    for num_tokens in (1, 29):
        x, index, weights = slots(num_tokens, 2, 4, unused=2)
        expected = dense_expert_lora(experts, x, index, weights)
        assert_same(
            expert_lora(experts, x, index, weights, path), expected, [x, weights, *factors], [x, weights, *factors]
        )


@pytest.mark.parametrize("path", EVERY_PATH)
@pytest.mark.parametrize("ids", [None, (0, 3)])
@pytest.mark.parametrize("grad", [True, False])
def test_up_matrices_packed_rank_by_rank_give_the_same(path, ids, grad):
    for num_tokens, top_k in ((1, 1), (1, 4), (29, 2)):
        experts, factors = experts_with_pairs(ids=ids, rank_major=True)
        assert ids is not None or experts.first.pairs[0].B.stride(0) == 1
        x, index, weights = slots(num_tokens, top_k, 4)
        with torch.set_grad_enabled(grad):
            actual, expected = (
                expert_lora(experts, x, index, weights, path),
                dense_expert_lora(experts, x, index, weights),
            )
        leaves = [x, weights, *factors]
        assert_same(actual, expected, leaves, leaves)


def test_few_slots_read_the_factors_and_matrices_of_their_experts_alone(monkeypatch):
    experts, _ = experts_with_pairs(dtype=torch.bfloat16)
    read = []
    own = type(experts.first.stack).product
    monkeypatch.setattr(type(experts.first.stack), "product", lambda self, e, x: (read.append(e), own(self, e, x))[1])
    monkeypatch.setattr(type(experts.first.stack), "unbind", lambda *_: pytest.fail("all matrices were read"))
    monkeypatch.setattr(LowRankPairs, "read", lambda *_: pytest.fail("all factors were cast"))
    x, index, weights = slots(1, 2, 4)
    with torch.no_grad():
        expert_lora(experts, x.bfloat16(), index, weights.bfloat16())
    assert read == 2 * index[0].tolist()


@pytest.mark.parametrize("path", EVERY_PATH)
def test_pairs_of_several_adapters_add_up(path):
    experts, factors = experts_with_pairs(ranks=(3, 5))
    x, index, weights = slots(13, 2, 4)
    expected = dense_expert_lora(experts, x, index, weights)
    assert_same(expert_lora(experts, x, index, weights, path), expected, [x, *factors], [x, *factors])


@pytest.mark.parametrize("path", EVERY_PATH)
def test_every_factor_has_a_gradient_wherever_the_tokens_go(path):
    for ids in (None, (2,)):
        experts, factors = experts_with_pairs(ids=ids)
        for num_tokens in (0, 7):
            x, index, weights = slots(num_tokens, 1, 4, unused=2)
            expert_lora(experts, x, index, weights, path).sum().backward()
            assert all(factor.grad is not None and torch.isfinite(factor.grad).all() for factor in factors)
            if num_tokens == 0:
                assert not any(factor.grad.any() for factor in factors)


@pytest.mark.parametrize("path", EVERY_PATH)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.01)]
)
def test_16_and_32_bit_equal_the_definition_to_rounding(path, dtype, tolerance):
    for ids in (None, (0, 3)):
        exact, exact_factors = experts_with_pairs(ids=ids)
        rounded, factors = experts_with_pairs(ids=ids, dtype=dtype)
        x, index, weights = slots(29, 2, 4)
        expected = dense_expert_lora(exact, x, index, weights)
        y = x.detach().to(dtype).requires_grad_()
        actual = expert_lora(rounded, y, index, weights.float(), path)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)
        # A gradient that is one number everywhere has no strides of its own.
        wanted = torch.autograd.grad(expected.sum(), [x, *exact_factors])
        got = torch.autograd.grad(actual.sum(), [y, *factors])
        for one, other in zip(got, wanted, strict=True):
            scale = other.abs().max()
            torch.testing.assert_close(one.double() / scale, other / scale, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("rank", [1, 4, 6, 12])
def test_grouped_products_take_any_rank_in_16_bit(rank):
    experts, factors = experts_with_pairs(ranks=(rank,), dtype=torch.bfloat16)
    x, index, weights = slots(29, 2, 4)
    y = x.detach().bfloat16()
    expected = expert_lora(experts, y, index, weights.float(), "segment")
    actual = expert_lora(experts, y, index, weights.float(), "grouped")
    torch.testing.assert_close(actual / expected.abs().max(), expected / expected.abs().max(), rtol=0, atol=0.01)
    actual.sum().backward()
    assert all(torch.isfinite(factor.grad).all() for factor in factors)


def test_float32_factors_beside_16_bit_matrices_are_cast_and_have_gradients_of_their_own_dtype():
    experts, _ = experts_with_pairs(dtype=torch.bfloat16)
    _, factors = experts_with_pairs(dtype=torch.float32)
    pairs = [
        dataclasses.replace(own, A=A, B=B)
        for own, A, B in zip([*experts.first.pairs, *experts.down.pairs], factors[::2], factors[1::2], strict=True)
    ]
    mixed = dataclasses.replace(
        experts,
        first=dataclasses.replace(experts.first, pairs=(pairs[0],)),
        down=dataclasses.replace(experts.down, pairs=(pairs[1],)),
    )
    x, index, weights = slots(13, 2, 4)
    for path in EVERY_PATH:
        out = expert_lora(mixed, x.detach().bfloat16(), index, weights.float(), path)
        assert out.dtype == torch.bfloat16
        assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), factors))


def test_autocast_leaves_the_dtype_of_the_matrices():
    experts, _ = experts_with_pairs(dtype=torch.float32)
    x, index, weights = slots(29, 2, 4)
    for path in EVERY_PATH:
        expected = expert_lora(experts, x.detach().float(), index, weights.float(), path)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(expert_lora(experts, x.detach().float(), index, weights.float(), path), expected)


def test_leading_shapes_are_kept():
    experts, _ = experts_with_pairs()
    x, index, weights = slots(12, 2, 4)
    expected = expert_lora(experts, x, index, weights)
    assert torch.equal(expert_lora(experts, x.view(3, 4, D), index, weights), expected.view(3, 4, D))


class Halve(nn.Module):
    def forward(self, x):
        return x / 2


@pytest.mark.parametrize("path", EVERY_PATH)
def test_dropout_stands_before_the_down_projection_alone(path):
    experts, _ = experts_with_pairs()
    halved = [
        dataclasses.replace(m, pairs=tuple(dataclasses.replace(p, dropout=Halve()) for p in m.pairs))
        for m in (experts.first, experts.down)
    ]
    weaker = [
        dataclasses.replace(m, pairs=tuple(dataclasses.replace(p, scaling=p.scaling / 2) for p in m.pairs))
        for m in (experts.first, experts.down)
    ]
    x, index, weights = slots(13, 2, 4)
    actual = expert_lora(dataclasses.replace(experts, first=halved[0], down=halved[1]), x, index, weights, path)
    expected = expert_lora(dataclasses.replace(experts, first=weaker[0], down=weaker[1]), x, index, weights, path)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("num_tokens", "dtype"), [(4, torch.float32), (40, torch.bfloat16), (40, torch.float32)])
@pytest.mark.parametrize("ids", [None, (1, 2)])
def test_compiles_to_one_graph_with_its_gradients(num_tokens, dtype, ids):
    experts, factors = experts_with_pairs(ids=ids, dtype=dtype, ranks=(4,))
    x, index, weights = slots(num_tokens, 2, 4)
    y, w = x.detach().to(dtype).requires_grad_(), weights.detach().float()
    compiled = torch.compile(lambda x, i, w: expert_lora(experts, x, i, w), backend="aot_eager", fullgraph=True)
    expected, actual = expert_lora(experts, y, index, w), compiled(y, index, w)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    got, wanted = torch.autograd.grad(actual.sum(), [y, *factors]), torch.autograd.grad(expected.sum(), [y, *factors])
    for one, other in zip(got, wanted, strict=True):
        scale = other.abs().max()
        torch.testing.assert_close(one / scale, other / scale, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("path", ["segment", "grouped"])
def test_nothing_of_the_size_of_the_adapted_stacks_is_kept_for_the_backward(path):
    experts, _ = experts_with_pairs(num_experts=64, dtype=torch.float32, ranks=(4,))
    x, index, weights = slots(2, 2, 64)
    own = {
        t.untyped_storage().data_ptr()
        for m in (experts.first, experts.down)
        for t in (m.stack.matrices(), *(f for p in m.pairs for f in (p.A, p.B)))
    }
    kept = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        expert_lora(experts, x.float(), index, weights.float(), path)
    assert max(kept) <= 64  # where the rows of an expert end
