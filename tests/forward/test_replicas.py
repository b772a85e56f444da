"""Copies of an adapter on the processes of a split model; tests/processes/test_replicas.py has several of them."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import distributed as dist

from moe_peft import RoutedConfig, synchronize_adapters
from moe_peft.forward.replicas import is_split
from tests.tiny import tiny_llama


def test_with_one_process_nothing_is_split_and_nothing_is_hooked(tmp_path):
    model = get_peft_model(tiny_llama(), RoutedConfig(num_experts=2, top_k=1, target_modules=["q_proj"]))
    before = {name: own.detach().clone() for name, own in model.named_parameters()}
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        synchronize_adapters(model)
        assert not is_split(model)
    finally:
        dist.destroy_process_group()
    assert all(torch.equal(own, before[name]) for name, own in model.named_parameters())
    assert not any(own._post_accumulate_grad_hooks for own in model.parameters())


def test_what_is_no_model_is_refused_by_name():
    with pytest.raises(TypeError, match=r"synchronize_adapters: model='adapter' must be a model with adapters"):
        synchronize_adapters("adapter")
