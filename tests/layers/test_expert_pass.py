"""Another computation stands at a module's forward for one call of one thread, and nothing is left of it."""

from __future__ import annotations

import threading

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn

from moe_peft.layers.expert_pass import call_with, is_watched, owner_of_pass, replaced_forward


def test_the_module_is_called_and_the_computation_runs():
    module, seen = nn.Identity(), []
    module.register_forward_hook(lambda *_: seen.append(None))
    with replaced_forward(module, "me", lambda x: x + 1):
        assert module(torch.ones(1)) == 2 and seen
        assert owner_of_pass(module) == "me"
    assert owner_of_pass(module) is None and "forward" not in module.__dict__
    assert module(torch.ones(1)) == 1


def test_the_innermost_of_nested_ones_runs():
    module = nn.Identity()
    with replaced_forward(module, "outer", lambda x: x + 1):
        with replaced_forward(module, "inner", lambda x: x + 2):
            assert module(torch.ones(1)) == 3 and owner_of_pass(module) == "inner"
        assert module(torch.ones(1)) == 2 and owner_of_pass(module) == "outer"
    assert module(torch.ones(1)) == 1


def test_other_threads_see_the_module_itself():
    module, out = nn.Identity(), []
    with replaced_forward(module, "me", lambda x: x + 1):
        thread = threading.Thread(target=lambda: out.extend([module(torch.ones(1)), owner_of_pass(module)]))
        thread.start()
        thread.join()
    assert out == [1, None]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing(error):
    module = nn.Identity()

    def fail(x):
        raise error

    with pytest.raises(error), replaced_forward(module, "me", fail):
        module(torch.ones(1))
    assert "forward" not in module.__dict__ and module(torch.ones(1)) == 1


def test_a_forward_of_the_modules_own_attribute_comes_back():
    module = nn.Identity()
    own = module.forward = lambda x: x * 5
    with replaced_forward(module, "me", lambda x: x + 1):
        assert module(torch.ones(1)) == 2
    assert module.__dict__["forward"] is own and is_watched(module) is False


def test_hooks_of_accelerate_run_around_the_computation():
    module = nn.Linear(2, 2)
    add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    own = module.__dict__["_old_forward"]
    with replaced_forward(module, "me", lambda x: x + 1):
        assert torch.equal(module(torch.ones(1, 2)), torch.full((1, 2), 2.0))
    assert module.__dict__["_old_forward"] is own and is_watched(module)


def test_hooks_watch_a_module():
    module = nn.Identity()
    assert not is_watched(module)
    handle = module.register_forward_pre_hook(lambda *_: None)
    assert is_watched(module)
    handle.remove()
    assert not is_watched(module)


def test_a_module_that_nobody_watches_is_not_called(monkeypatch):
    module = nn.Identity()
    monkeypatch.setattr(nn.Identity, "__call__", lambda *_: pytest.fail("called"))
    assert call_with(lambda x: x + 1, "me", module, module, 1) == 2


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_hook_sees_the_call_and_what_was_computed(everywhere):
    module, seen = nn.Identity(), []

    def hook(module, inputs, output):
        seen.append(int(output))

    register = nn.modules.module.register_module_forward_hook if everywhere else module.register_forward_hook
    handle = register(hook)
    try:
        assert call_with(lambda x: x + 1, "me", module, module, torch.tensor(1)) == 2
    finally:
        handle.remove()
    assert seen == [2]
