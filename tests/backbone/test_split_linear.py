"""Pieces of split layers; tests/processes/test_parallel.py has the layers themselves in two processes."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from torch import distributed as dist
from torch import nn
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

from moe_peft.backbone.split_linear import Slices, WholeLinear, is_split, why_not_whole


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("width", [1, 4, 7, 12])
def test_pieces_are_those_of_distributed_tensors(width, count):
    whole = torch.arange(width)
    expected = list(whole.chunk(count))
    expected += [whole[:0]] * (count - len(expected))
    found = [whole[Slices(width, count, rank, None).own] for rank in range(count)]
    assert [piece.tolist() for piece in found] == [piece.tolist() for piece in expected]


def test_whole_and_offloaded_layers_are_not_split():
    assert not is_split(nn.Linear(3, 4))
    assert not is_split(cpu_offload(nn.Linear(3, 4)))


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        yield dist.init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
    finally:
        dist.destroy_process_group()


def split(mesh, placement):
    layer = nn.Linear(6, 4, bias=False)
    layer.weight = nn.Parameter(dist.tensor.distribute_tensor(layer.weight.data, mesh, [placement]))
    layer.forward = lambda x: x @ layer.weight.to_local().T
    return layer


def test_a_layer_split_over_one_process_computes_as_it_does(mesh):
    layer = split(mesh, dist.tensor.Shard(0))
    assert is_split(layer) and why_not_whole(layer) is None
    x = torch.randn(2, 3, 6, requires_grad=True)
    whole = WholeLinear(layer, layer, 6, 4)
    out = whole.own_part(whole(whole.whole_input(x)))
    assert torch.equal(out, layer(x))


def test_pieces_of_several_matrices_in_one_are_refused(mesh):
    layer = nn.Linear(6, 4, bias=False)
    ALL_PARALLEL_STYLES["packed_colwise"].shard_param(layer, "weight", mesh)
    layer.forward = lambda x: x
    assert is_split(layer) and "packed style" in why_not_whole(layer)
