"""A bank of pairs: flat tensors, a start at the identity, and the change that each pair makes."""

from __future__ import annotations

import pytest
import torch

from moe_peft.experts.expert_pairs import MATRICES, ExpertPairs

WIDTHS = {"gate_up": (6, 10), "down": (5, 6)}


def bank(**fields):
    return ExpertPairs(WIDTHS, **{"num_experts": 3, "r": 2, "scaling": 0.5, **fields})


def test_tensors_are_flat_and_of_the_widths_of_their_matrices():
    assert {name: tuple(p.shape) for name, p in bank().named_parameters()} == {
        "gate_up_A": (3, 2, 6),
        "gate_up_B": (3, 2, 10),
        "down_A": (3, 2, 5),
        "down_B": (3, 2, 6),
    }
    only = ExpertPairs({"down": (5, 6)}, num_experts=3, r=2, scaling=1.0)
    assert list(dict(only.named_parameters())) == ["down_A", "down_B"] and only.up == ("down_B",)
    assert tuple(WIDTHS) == MATRICES


@pytest.mark.parametrize(("init", "zero"), [(True, True), ("gaussian", True), (False, False)])
def test_starts_at_the_identity_but_for_tests(init, zero):
    own = bank(init_weights=init)
    for matrix in MATRICES:
        A, B = own.pair(matrix)
        assert A.any() and bool(B.any()) is not zero
        assert init == "gaussian" or A.abs().max() <= A.shape[-1] ** -0.5


def test_the_change_of_a_matrix_is_the_scaled_product_of_its_pair():
    own = bank(init_weights=False)
    A, B = own.pair("down")
    torch.testing.assert_close(own.delta("down", 1), 0.5 * A[1].T @ B[1])
    assert own.bfloat16().delta("down", 1).dtype == torch.float32
    assert own.double().delta("down", 1).dtype == torch.float64


def test_pairs_are_views_of_the_parameters_with_dropout_in_training_alone():
    table = torch.tensor([0, 3, 1, 2])
    own = bank(lora_dropout=0.3)
    pairs = own((0, 2, 3), table)
    assert pairs["down"].A is own.pair("down")[0] and pairs["down"].B is own.pair("down")[1]
    assert (pairs["down"].ids, pairs["down"].scaling, pairs["down"].dropout) == ((0, 2, 3), 0.5, None)
    assert own(None, None, training=True)["gate_up"].dropout is own.lora_dropout
    own.lora_dropout.p = 0.0
    assert own(None, None, training=True)["gate_up"].dropout is None


def test_says_what_it_holds():
    assert "matrices=('gate_up', 'down'), num_experts=3, r=2" in repr(bank())
