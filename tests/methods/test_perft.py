"""PERFT's variants equal their formulas on real sparse blocks, and each other where the formulas say so."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from moe_peft import MoePeftWarning
from moe_peft.layers import RoutedLayer
from tests import perft_reference, reference
from tests.compare import assert_same
from tests.perft_models import (
    RENORMALISING,
    SPARSE,
    block_of,
    experts_of,
    layer_of,
    perft_config,
    perft_model,
    router_weight,
    sparse_model,
)
from tests.tiny import padded_batch

VARIANTS = ("R", "E", "D", "S")
ACTS = {"low_rank": perft_reference.identity, "bottleneck": perft_reference.silu}


def base_block(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with model.disable_adapter():
        return block_of(model)(x)


def delta(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the adapters add to the block's output."""
    return block_of(model)(x) - base_block(model, x)


def tokens(num_tokens: int) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randn(1, num_tokens, 32, dtype=torch.float64)


def backbone_gates(model: nn.Module, x: torch.Tensor) -> reference.Gates:
    """The backbone's decision about each token, from the inputs of its experts."""
    seen = []
    layer = layer_of(model)
    base = (
        layer.get_base_layer() if hasattr(layer.get_base_layer(), "gate_up_proj") else layer.get_base_layer().experts
    )
    handle = base.register_forward_pre_hook(lambda module, args: seen.append(args))
    base_block(model, x)
    handle.remove()
    _, index, weights = seen[0]
    return [{int(e): w.double() for e, w in zip(*pair, strict=True)} for pair in zip(index, weights, strict=True)]


def copy_bank(source: nn.Module, target: nn.Module) -> None:
    """Give every layer of one model the experts of the other, in a bank of another division of the same rows."""
    banks = [
        [m.experts["default"] for m in model.modules() if isinstance(m, RoutedLayer)] for model in (source, target)
    ]
    for own, other in zip(*banks, strict=True):
        other.A.data.copy_(own.A.reshape(other.A.shape))
        other.B.data.copy_(own.B.reshape(other.B.shape))


@pytest.mark.parametrize("num_tokens", [1, 13, 63])
@pytest.mark.parametrize("experts", ["low_rank", "bottleneck"])
@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 2), (4, 4), (3, 1)])
def test_r_equals_its_formula(num_tokens, experts, num_experts, top_k):
    model = perft_model("olmoe", "R", num_experts=num_experts, top_k=top_k, experts=experts)
    x = tokens(num_tokens).requires_grad_()
    Wr, bank = router_weight(model), experts_of(model)
    gates, _ = reference.top_k_gates(reference.router_probs(x[0], Wr), top_k)
    expected = perft_reference.beside(
        base_block(model, x)[0], x[0], bank.A, bank.B.mT, gates, scaling=bank.scaling, act=ACTS[experts]
    )
    assert bank.scaling == (2.0 if experts == "low_rank" else 1.0)
    leaves = [x, Wr, bank.A, bank.B]
    assert_same(block_of(model)(x)[0], expected, leaves, leaves, tolerance=1e-10)


def test_r_equals_its_formula_with_an_adapter_that_no_token_uses():
    model = perft_model("olmoe", "R", num_experts=4, top_k=2)
    x = tokens(13)
    x[..., 0] = 5.0
    Wr, bank = router_weight(model), experts_of(model)
    Wr.data[3, 0] = -20.0
    gates, chosen = reference.top_k_gates(reference.router_probs(x[0], Wr), 2)
    assert not any(3 in row for row in chosen)
    expected = perft_reference.beside(base_block(model, x)[0], x[0], bank.A, bank.B.mT, gates, scaling=bank.scaling)
    leaves = [Wr, bank.A, bank.B]
    assert_same(block_of(model)(x)[0], expected, leaves, leaves, tolerance=1e-10)


@pytest.mark.parametrize("num_tokens", [1, 13, 63])
@pytest.mark.parametrize("experts", ["low_rank", "bottleneck"])
@pytest.mark.parametrize(("variant", "num_experts"), [("D", 3), ("S", None)])
def test_d_and_s_equal_their_formula(num_tokens, experts, variant, num_experts):
    model = perft_model("olmoe", variant, num_experts=num_experts, experts=experts)
    x = tokens(num_tokens).requires_grad_()
    bank = experts_of(model)
    gates = [{m: torch.ones((), dtype=torch.float64) for m in range(num_experts or 1)}] * num_tokens
    expected = perft_reference.beside(
        base_block(model, x)[0], x[0], bank.A, bank.B.mT, gates, scaling=bank.scaling, act=ACTS[experts]
    )
    leaves = [x, bank.A, bank.B]
    assert_same(block_of(model)(x)[0], expected, leaves, leaves, tolerance=1e-10)


@pytest.mark.parametrize("num_tokens", [1, 13, 63])
@pytest.mark.parametrize("experts", ["low_rank", "bottleneck"])
@pytest.mark.parametrize("name", ["olmoe", "mixtral", "qwen3_moe"])
def test_e_equals_adapters_inside_of_the_experts(name, experts, num_tokens):
    model = perft_model(name, "E", experts=experts)
    x = tokens(num_tokens).requires_grad_()
    bank, base = experts_of(model), layer_of(model).get_base_layer()
    gates = backbone_gates(model, x)
    assert num_tokens > 1 or len(gates[0]) < base.num_experts  # with one token some experts have none
    expected = perft_reference.embedded(
        x[0], base.gate_up_proj, base.down_proj, bank.A, bank.B.mT, gates, scaling=bank.scaling, act=ACTS[experts]
    )
    found, leaves = block_of(model)(x)[0], [bank.A, bank.B]
    assert_same(found, expected, leaves, leaves, tolerance=1e-10)
    assert_same(found, expected, [x], [x], tolerance=1e-6)  # the backbone's router is rounded to float32


@pytest.mark.parametrize("name", SPARSE)
def test_e_equals_a_branch_beside_the_block_with_the_backbone_s_decision(name):
    model = perft_model(name, "E")
    x, bank = tokens(13), experts_of(model)
    gates = backbone_gates(model, x)
    expected = perft_reference.beside(base_block(model, x)[0], x[0], bank.A, bank.B.mT, gates, scaling=bank.scaling)
    torch.testing.assert_close(block_of(model)(x)[0], expected)


@pytest.mark.parametrize("name", SPARSE)
def test_one_routed_adapter_is_s(name):
    routed, single = perft_model(name, "R", num_experts=1), perft_model(name, "S")
    copy_bank(single, routed)
    batch = padded_batch([9, 6])
    torch.testing.assert_close(routed(**batch).logits, single(**batch).logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SPARSE)
def test_d_is_s_of_the_summed_rank_at_the_same_scale(name):
    dense, single = perft_model(name, "D", num_experts=4, lora_alpha=5), perft_model(name, "S", r=12, lora_alpha=20)
    copy_bank(dense, single)
    batch = padded_batch([9, 6])
    torch.testing.assert_close(dense(**batch).logits, single(**batch).logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SPARSE)
def test_r_that_prefers_no_adapter_is_the_mean_of_d(name):
    routed, dense = perft_model(name, "R", num_experts=4, top_k=4), perft_model(name, "D", num_experts=4)
    copy_bank(dense, routed)
    router_weight(routed).data.zero_()
    x = tokens(13)
    torch.testing.assert_close(delta(routed, x), delta(dense, x) / 4, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SPARSE)
def test_e_with_equal_adapters_is_s_times_the_sum_of_the_backbone_s_weights(name):
    embedded, single = perft_model(name, "E"), perft_model(name, "S")
    bank = experts_of(embedded)
    bank.A.data.copy_(experts_of(single).A.expand_as(bank.A))
    bank.B.data.copy_(experts_of(single).B.expand_as(bank.B))
    x = tokens(13)
    sums = torch.stack([sum(row.values()) for row in backbone_gates(embedded, x)])
    if name in RENORMALISING:
        torch.testing.assert_close(sums, torch.ones(13, dtype=torch.float64), rtol=0, atol=1e-6)
    else:
        assert sums.std() > 0.01
    torch.testing.assert_close(delta(embedded, x), delta(single, x) * sums[:, None], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SPARSE)
def test_fresh_adapters_change_no_bit_of_any_backbone(name, variant):
    base = sparse_model(name)
    model = get_peft_model(copy.deepcopy(base), perft_config(variant)).eval()
    batch = padded_batch([9, 6])
    assert torch.equal(model(**batch).logits, base(**batch).logits)


@pytest.mark.parametrize("fields", [{}, {"top_k": 1}, {"norm_topk_prob": True}, {"router": "dense"}])
@pytest.mark.parametrize("name", SPARSE)
def test_the_task_alone_teaches_the_router_of_r(name, fields):
    model = perft_model(name, "R", router_aux_loss_coef=0.0, **fields).train()
    batch = padded_batch([9, 6])
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert router_weight(model).grad.abs().max() > 1e-6


def test_a_single_renormalised_choice_warns_and_keeps_the_task_from_the_router():
    with pytest.warns(MoePeftWarning, match="top_k=1, norm_topk_prob=True .* Write norm_topk_prob=False, or top_k=2"):
        model = perft_model("olmoe", "R", router_aux_loss_coef=0.0, top_k=1, norm_topk_prob=True).train()
    batch = padded_batch([9, 6])
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert router_weight(model).grad.abs().max() < 1e-12
