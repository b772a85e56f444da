"""Sparse down matrices that never train: the sum, their zeros and sizes, files, and merges."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model

from moe_peft import RoutedConfig, routed_layers
from moe_peft.experts.sparse_down import SparseDownExperts
from tests.compare import assert_same, random_routing
from tests.contract.cases import randomize
from tests.tiny import padded_batch, tiny_llama

from .bank import E, T, assert_merges, made


def test_adds_the_weighed_sum_of_its_matrices():
    bank, x, base = made(SparseDownExperts)
    routing = random_routing(T, E, 2)
    gates = routing.gate_matrix()
    expected = base + sum(1.7 * gates[:, e : e + 1] * (x @ bank.A[e].T @ bank.B[e]) for e in range(E))
    leaves = [x, routing.logits, bank.B]
    assert_same(bank(x, base, routing), expected, leaves, leaves, 1e-10)


@pytest.mark.parametrize(("density", "count"), [(0.25, 50), (1.0, 200), (1e-9, 1)])
def test_rows_have_their_share_of_numbers_of_the_size_of_one_over_the_experts(density, count):
    torch.manual_seed(0)
    bank = SparseDownExperts(200, 5, num_experts=8, r=4, scaling=1.0, density=density)
    assert ((bank.A != 0).sum(-1) == count).all()
    if count > 1:
        assert bank.A[bank.A != 0].std().item() == pytest.approx(1 / 8, rel=0.1)


def test_only_up_matrices_train_and_files_hold_both(tmp_path):
    config, batch = RoutedConfig(experts="sparse_down", num_experts=4, r=1), padded_batch([5, 3])
    model = get_peft_model(tiny_llama(), config).eval()
    bank = routed_layers(model)[0].experts["default"]
    assert not bank.A.requires_grad and bank.B.requires_grad
    randomize(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_merges_under_constant_weights():
    assert_merges("sparse_down")
