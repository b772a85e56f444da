"""Which modules may be read instead of called: those whose call is their class's forward and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_peft.layers.shared_rows import is_plain


def hooked(module):
    module.register_forward_hook(lambda *args: None)


def replaced(module):
    module.forward = module.forward


@pytest.mark.parametrize(
    "change",
    [
        hooked,
        replaced,
        lambda module: module.register_forward_pre_hook(lambda *args: None),
        lambda module: module.register_full_backward_hook(lambda *args: None),
        lambda module: module.compile(backend="eager"),
        lambda module: module.to("meta"),
    ],
)
def test_a_module_whose_call_does_more_than_its_forward_is_not_plain(change):
    module = nn.Linear(2, 2)
    assert is_plain(module)
    change(module)
    assert not is_plain(module)


def test_a_hook_on_all_modules_is_seen_too():
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert not is_plain(nn.Linear(2, 2))
    finally:
        handle.remove()
