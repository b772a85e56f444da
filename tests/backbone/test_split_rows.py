"""Which rows of an adapter a process holds: those of its experts, in the order that local ids have."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import distributed as dist
from torch import nn

from moe_peft.backbone.local_experts import local_experts
from moe_peft.backbone.split_rows import SplitRows, read_here
from tests.contract.cases import tiny_olmoe
from tests.shared_experts import group_of_one, shared_out


def rows_of(rank, num_experts, processes, ids):
    """The rows of one of several processes, of which there is one alone here."""
    mesh = SimpleNamespace(size=lambda: processes)
    return SplitRows(SimpleNamespace(num_experts=num_experts // processes, mesh=mesh, rank=rank), num_experts, ids)


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("ids", [None, (0,), (7,), (0, 1, 2), (1, 4, 5, 6), tuple(range(8))])
def test_each_row_lies_in_one_process_at_the_place_that_local_ids_point_to(ids, processes):
    chosen = list(range(8) if ids is None else ids)
    parts = [rows_of(rank, 8, processes, ids) for rank in range(processes)]
    assert sorted(row for own in parts for row in own.own) == list(range(len(chosen)))
    assert len({own.size for own in parts}) == 1 and parts[0].size == max(len(own.own) for own in parts)
    whole = torch.tensor(chosen)[:, None].float()
    padded = torch.cat([torch.cat([whole[list(own.own)], torch.zeros(own.size - len(own.own), 1)]) for own in parts])
    for rank, own in enumerate(parts):
        assert torch.equal(own.whole(padded), whole) and own.shape(padded) == tuple(whole.shape)
        held = 8 // processes
        places = own.rows_of(torch.arange(held + 2)[:, None]).flatten().tolist()  # and slots of other processes
        for local_id, place in enumerate(places[:held]):
            expert = rank * held + local_id
            assert (place < own.size) == (expert in chosen)
            assert place == own.size or chosen[own.own[place]] == expert
        assert places[held:] == [own.size] * 2


def test_processes_must_hold_equal_parts_of_all_experts():
    with pytest.raises(ValueError, match="2 processes hold 3 experts each of the 7 experts"):
        rows_of(0, 7, 2, None)


def test_a_bank_reads_its_part_in_the_graph_and_has_its_parameters_again(tmp_path):
    with group_of_one(tmp_path):
        local = local_experts(shared_out(tiny_olmoe()).model.layers[0].mlp.experts)
        rows, bank = SplitRows(local, 4, (1, 2)), nn.Module()
        whole = torch.arange(6.0).view(2, 3)
        bank.weight = own = nn.Parameter(rows.split(whole))
        assert torch.equal(rows.whole(own.detach()), whole) and rows.ids == (1, 2)
        with read_here(bank, rows):
            assert not isinstance(bank.weight, dist.tensor.DTensor)
            (3 * bank.weight).sum().backward()
        assert bank.weight is own and torch.equal(own.grad.full_tensor(), torch.full((2, 3), 3.0))
        with pytest.raises(KeyboardInterrupt), read_here(bank, rows):
            raise KeyboardInterrupt
        assert bank.weight is own
