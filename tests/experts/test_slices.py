"""Copies of experts against a loop over slots, values and gradients."""

from __future__ import annotations

import pytest
import torch

from moe_peft.experts import ExpertSlices
from tests.compare import assert_same

E, D, H, K = 5, 7, 4, 3
IDS = (1, 4)


def backbone_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"up_proj": (E, H, D), "up_bias": (E, H), "down_proj": (E, D, H)}
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}


def expert(tensors, e, x):
    return tensors["down_proj"][e] @ torch.tanh(tensors["up_proj"][e] @ x + tensors["up_bias"][e])


def compute(tensors, x_TD, experts_TK, weights_TK):
    """Stands for a backbone's computation: it refuses indices out of range, as backbones do."""
    assert experts_TK.max() < len(tensors["up_proj"])
    up = torch.einsum("tkhd,td->tkh", tensors["up_proj"][experts_TK], x_TD) + tensors["up_bias"][experts_TK]
    return torch.einsum("tkdh,tkh,tk->td", tensors["down_proj"][experts_TK], up.tanh(), weights_TK)


def case(num_tokens: int, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    x, base = (torch.randn(num_tokens, D, generator=generator, dtype=torch.float64) for _ in range(2))
    weights = torch.rand(num_tokens, K, generator=generator, dtype=torch.float64)
    places = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(num_tokens)])
    local = torch.tensor([2, 0, 2, 2, 1])[places]
    return x.requires_grad_(), base.requires_grad_(), local, weights.requires_grad_()


def loop(bank, x, base, local, weights):
    tensors, rows = dict(bank.named_parameters()), []
    for t in range(len(x)):
        y = base[t]
        for k in range(K):
            if local[t, k] < len(IDS):
                y = y + weights[t, k] * expert(tensors, int(local[t, k]), x[t])
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("num_tokens", [1, 13])
def test_output_and_gradients_equal_a_loop_over_slots(num_tokens):
    bank = ExpertSlices(backbone_tensors(), IDS)
    x, base, local, weights = case(num_tokens)
    leaves = [x, base, weights, *bank.parameters()]
    assert_same(bank(x, base, local, weights, compute), loop(bank, x, base, local, weights), leaves, leaves)


def test_static_shapes_give_the_same_output_and_gradients(monkeypatch):
    bank = ExpertSlices(backbone_tensors(), IDS)
    x, base, local, weights = case(13)
    leaves = [x, base, weights, *bank.parameters()]
    expected = bank(x, base, local, weights, compute)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert_same(bank(x, base, local, weights, compute), expected, leaves, leaves)


def test_copies_are_those_of_the_selected_experts_and_share_nothing():
    tensors = backbone_tensors()
    bank = ExpertSlices(tensors, IDS)
    for name, parameter in bank.named_parameters():
        assert torch.equal(parameter, tensors[name][list(IDS)]) and parameter.dtype == torch.float64
        assert parameter.untyped_storage().data_ptr() != tensors[name].untyped_storage().data_ptr()
    assert [name for name, _ in bank.named_parameters()] == ["up_proj", "up_bias", "down_proj"]
    assert repr(bank) == "ExpertSlices(num_experts=2)"


def test_copies_that_no_slot_uses_are_not_read_without_gradients():
    bank = ExpertSlices(backbone_tensors(), IDS)
    x, base, local, weights = case(3)
    for parameter in bank.parameters():
        parameter.data.fill_(torch.nan)
    with torch.no_grad():
        assert torch.equal(bank(x, base, torch.full_like(local, len(IDS)), weights, compute), base)


@pytest.mark.parametrize("num_tokens", [0, 6])
def test_parameters_get_zero_gradients_where_no_slot_uses_them(num_tokens):
    bank = ExpertSlices(backbone_tensors(), IDS)
    x, base, _, weights = case(6)
    x, base, weights = x[:num_tokens], base[:num_tokens], weights[:num_tokens]
    local = torch.full((num_tokens, K), len(IDS))
    output = bank(x, base, local, weights, compute)
    assert torch.equal(output, base)
    output.sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in bank.parameters())


@pytest.mark.parametrize("grad", [True, False])
def test_copies_that_no_slot_uses_are_not_read(grad):
    bank = ExpertSlices(backbone_tensors(), IDS)
    for parameter in bank.parameters():
        parameter.data.fill_(torch.inf)
    x, base, local, weights = case(4)
    with torch.set_grad_enabled(grad):
        out = bank(x, base, torch.full_like(local, 2), weights, compute)
    assert torch.equal(out, base) and (out.grad_fn is not None or not grad)


def test_a_copy_that_no_slot_uses_gets_a_zero_gradient_beside_one_that_is_used():
    bank = ExpertSlices(backbone_tensors(), IDS)
    x, base, _, weights = case(4)
    bank(x, base, torch.full((4, K), 1), weights, compute).sum().backward()
    for parameter in bank.parameters():
        assert not parameter.grad[0].any() and parameter.grad[1].any()


def test_a_meta_backbone_gives_meta_or_unfilled_copies():
    with torch.device("meta"):
        tensors = {name: torch.empty(tensor.shape) for name, tensor in backbone_tensors().items()}
        bank = ExpertSlices(backbone_tensors(), IDS)
    assert all(parameter.is_meta for parameter in bank.parameters())
    assert {n: tuple(p.shape) for n, p in ExpertSlices(tensors, IDS).named_parameters()} == {
        "up_proj": (2, H, D),
        "up_bias": (2, H),
        "down_proj": (2, D, H),
    }


def test_only_copies_in_use_are_cast_where_nothing_is_trained():
    bank = ExpertSlices(backbone_tensors(), (0, 1, 4)).float()
    x, base, local, weights = case(5)
    local = torch.where(local == 0, 2, 3)  # of the three copies the last one alone
    read = []

    def cast(tensors, *call):
        read.append({len(tensor) for tensor in tensors.values()})
        return compute({name: tensor.to(x.dtype) for name, tensor in tensors.items()}, *call)

    expected = bank(x, base, local, weights, cast)
    with torch.no_grad():
        found = bank(x, base, local, weights, cast)
    assert torch.equal(found, expected) and read == [{3}, {1}]
