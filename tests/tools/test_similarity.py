"""The cosine of two experts is that of what they add, of every kind of experts, and no such matrix is built."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch.nn import functional as F

import moe_peft
from moe_peft.experts import EXPERTS, Experts
from moe_peft.tools import delta_similarity
from tests.contract.cases import METHODS, MODELS, randomize
from tests.tiny import adapted_linear, routed_layer_of, tiny_llama


def one_hot(e: int, count: int) -> torch.Tensor:
    return torch.eye(count)[e]


@pytest.mark.parametrize("kind", sorted(kind for kind, own in EXPERTS.items() if own.placement == Experts.placement))
def test_cosines_are_those_of_the_matrices_that_single_experts_add(kind):
    model = adapted_linear(moe_peft.RoutedConfig(num_experts=4, r=2, experts=kind))
    bank = routed_layer_of(model).experts["default"]
    if bank.placement is None and not hasattr(bank, "scaling"):
        deltas = torch.cat([bank.c, bank.b], -1)
    elif bank.mergeable:
        deltas = torch.stack([bank.delta_weight(one_hot(e, 4)).flatten() for e in range(4)])
    else:
        deltas = torch.stack([(B.T @ A).flatten() for A, B in zip(bank.A, bank.B, strict=True)])
    expected = F.cosine_similarity(deltas[:, None].double(), deltas[None].double(), dim=-1)
    (found,) = delta_similarity(model).values()
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


def test_pairs_on_several_matrices_count_together():
    torch.manual_seed(0)
    sizes = {"num_experts": 3, "r": 2, "inner_features": 7, "scaling": 2.0, "init_weights": False}
    bank = EXPERTS["ffn_lora"](5, 6, **sizes)
    pairs = [(bank.gate_A, bank.gate_B), (bank.up_A, bank.up_B), (bank.down_A, bank.down_B)]
    deltas = [torch.cat([(2.0 * B[e].T @ A[e]).flatten() for A, B in pairs]).double() for e in range(3)]
    expected = torch.stack([torch.stack([a @ b for b in deltas]) for a in deltas])
    torch.testing.assert_close(bank.delta_products(), expected, atol=1e-6, rtol=1e-6)


def test_shared_experts_that_no_router_chooses_are_left_out():
    config = moe_peft.RoutedConfig(num_experts=3, r=2, experts_args={"shared": 2})
    (found,) = delta_similarity(adapted_linear(config)).values()
    assert found.shape == (3, 3)


def test_vectors_are_compared_by_their_offsets():
    model = get_peft_model(tiny_llama(), moe_peft.MovConfig(task_type="CAUSAL_LM", num_experts=3, init_weights=False))
    for layer in moe_peft.routed_layers(model):
        offsets = layer.experts["default"].vectors.double() - 1
        expected = F.cosine_similarity(offsets[:, None], offsets[None], dim=-1)
        torch.testing.assert_close(delta_similarity(model)[layer.place], expected)


@pytest.mark.parametrize("method", ["esft", "expert-lora", "expert-lora-selected", "perft-e"])
def test_experts_of_a_backbone_are_compared_by_what_they_change_by(method):
    case = MODELS["olmoe"]
    model = get_peft_model(case.build(), METHODS[method](task_type="CAUSAL_LM"))
    randomize(model)
    found = delta_similarity(model)
    for layer in moe_peft.routed_layers(model):
        bank, base = layer.experts["default"], layer.get_base_layer()
        if method == "esft":
            ids = list(layer.selections["default"])
            names = [name for name, _ in bank.named_parameters()]
            parts = [(getattr(bank, n) - getattr(base, n)[ids]).detach().flatten(1) for n in names]
        elif method == "perft-e":
            parts = [torch.stack([(B.T @ A).flatten() for A, B in zip(bank.A, bank.B, strict=True)])]
        else:
            parts = [torch.stack([bank.delta(m, e).flatten() for e in range(bank.num_experts)]) for m in bank.matrices]
        deltas = torch.cat(parts, dim=1).double()
        expected = F.cosine_similarity(deltas[:, None], deltas[None], dim=-1)
        torch.testing.assert_close(found[layer.place], expected, atol=1e-5, rtol=1e-5)


def test_experts_that_add_nothing_have_no_cosine():
    config = moe_peft.RoutedConfig(task_type="CAUSAL_LM", num_experts=3)
    assert all(own.isnan().all() for own in delta_similarity(get_peft_model(tiny_llama(), config)).values())


def test_a_name_that_no_adapter_has_is_refused():
    with pytest.raises(ValueError, match="no routed adapter 'law'"):
        delta_similarity(adapted_linear(moe_peft.RoutedConfig(num_experts=2)), "law")
    with pytest.raises(TypeError, match="is no model"):
        delta_similarity("model")
