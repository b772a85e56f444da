"""Stacks give each expert's matrix in one orientation; pairs know whose they are."""

from __future__ import annotations

import torch
from torch import nn

from moe_peft.ops.expert_stacks import LowRankPairs, PlainStack


def test_both_layouts_give_matrices_of_input_by_output():
    weight = torch.randn(4, 6, 3)
    for stored, transposed in ((weight, True), (weight.transpose(1, 2).contiguous(), False)):
        stack = PlainStack(stored, is_transposed=transposed)
        assert torch.equal(stack.matrices(), weight)
        assert all(torch.equal(one, own) for one, own in zip(stack.unbind(), weight, strict=True))
        assert torch.equal(stack.matrix(2), weight[2])
        assert stack.matrices().untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()


def test_experts_beyond_the_number_are_left_out():
    stack = PlainStack(torch.randn(4, 6, 3), is_transposed=False, num_experts=2)
    assert stack.num_experts == len(stack.unbind()) == len(stack.matrices()) == 2


def test_pairs_of_some_experts_know_their_places():
    A, B = torch.randn(2, 1, 3), torch.randn(2, 1, 4)
    every, some = LowRankPairs(A, B, 1.0), LowRankPairs(A, B, 1.0, ids=(1, 5))
    assert [every.place(e) for e in (0, 1)] == [0, 1]
    assert [some.place(e) for e in (0, 1, 5)] == [None, 0, 1]


def test_pairs_are_cast_where_they_differ_and_keep_everything_else():
    A, B = torch.randn(2, 1, 3), torch.randn(2, 1, 4)
    dropout, table = nn.Dropout(0.5), torch.tensor([0, 1])
    own = LowRankPairs(A, B, 0.3, (0, 1), table, dropout)
    assert own.read(torch.float32) is own
    cast = own.read(torch.bfloat16)
    assert cast.A.dtype == cast.B.dtype == torch.bfloat16
    assert (cast.scaling, cast.ids, cast.table, cast.dropout) == (0.3, (0, 1), table, dropout)


def test_dropout_is_applied_to_the_rows_where_there_is_one():
    A, B, x = torch.randn(2, 1, 3), torch.randn(2, 1, 4), torch.ones(5, 3)
    assert LowRankPairs(A, B, 1.0).drop(x) is x
    assert not LowRankPairs(A, B, 1.0, dropout=nn.Dropout(1.0)).drop(x).any()
