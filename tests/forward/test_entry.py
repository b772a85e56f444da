"""A call of a module is opened and closed once, whichever way it is made and however it ends."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from moe_peft import LoraMoeConfig, MovConfig, SiraConfig
from moe_peft.forward.entry import ModuleEntry
from tests.tiny import adapted_linear


class Keeper:
    """Writes down what it is told."""

    def __init__(self):
        self.calls, self.log = [], []

    def open(self, entry, args, kwargs, *, hooked):
        self.calls.append(hooked)
        self.log.append("open")
        return args, kwargs

    def close(self, entry, output):
        self.log.append("close")
        self.calls.pop()
        return output

    def depth(self):
        return len(self.calls)

    def reach(self, entry):
        return bool(self.calls) and self.calls[-1]

    def drop(self, depth):
        del self.calls[depth:]


class Doubles(nn.Module):
    def forward(self, x, fails: type[BaseException] | None = None):
        if fails is not None:
            raise fails
        return 2 * x


def entered():
    module, keeper = Doubles(), Keeper()
    return module, keeper, ModuleEntry(keeper, module, is_model=True, is_stack=True)


WAYS = {
    "called": lambda module, *args: module(*args),
    "forward": lambda module, *args: module.forward(*args),
    "forward of its class": lambda module, *args: module.forward(module, *args),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_in_opens_and_closes_one_call(way):
    module, keeper, _ = entered()
    assert torch.equal(WAYS[way](module, torch.ones(2)), torch.full((2,), 2.0))
    assert keeper.log == ["open", "close"] and keeper.calls == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("way", ["called", "forward"])
def test_no_call_stays_open_whatever_ends_it(way, error):
    module, keeper, _ = entered()
    with pytest.raises(error):
        WAYS[way](module, torch.ones(2), error)
    assert keeper.calls == [] and keeper.log[0] == "open"
    WAYS[way](module, torch.ones(2))
    assert keeper.calls == []


def test_the_forward_keeps_its_signature_and_its_name():
    module, _, _ = entered()
    assert list(inspect.signature(module.forward).parameters) == ["x", "fails"]
    assert module.forward.__name__ == "forward"


@pytest.mark.parametrize("own", [False, True])
def test_a_removed_entry_leaves_the_module_as_it_was(own):
    module, keeper = Doubles(), Keeper()
    if own:
        module.forward = lambda x: 3 * x
    before = dict(module.__dict__), len(module._forward_hooks), len(module._forward_pre_hooks)
    entry = ModuleEntry(keeper, module, is_model=False, is_stack=True)
    assert float(module(torch.tensor(1.0))) == (3.0 if own else 2.0)
    entry.remove()
    assert (dict(module.__dict__), len(module._forward_hooks), len(module._forward_pre_hooks)) == before
    keeper.log.clear()
    assert float(module(torch.tensor(1.0))) == (3.0 if own else 2.0) and keeper.log == []


def test_who_has_wrapped_the_forward_since_calls_through_a_removed_entry():
    module, keeper, entry = entered()
    behind = module.forward
    module.forward = lambda x: behind(x) + 1
    entry.remove()
    assert float(module(torch.tensor(1.0))) == 3.0 and keeper.log == []


@pytest.mark.parametrize("config", [LoraMoeConfig(r=2), SiraConfig(r=2), MovConfig()], ids=lambda own: own.method)
def test_an_adapted_model_is_exported_whole_with_sizes_that_may_change(config):
    model = adapted_linear(config).eval()
    auto = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    x, other = torch.randn(2, 3, 7).double(), torch.randn(4, 5, 7).double()
    with torch.no_grad():
        exported = torch.export.export(model.get_base_model(), (x,), dynamic_shapes={"x": auto}).module()
        torch.testing.assert_close(exported(other), model(other))
