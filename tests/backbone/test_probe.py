"""Which modules a forward pass calls."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_peft import RoutedConfig, describe
from moe_peft.backbone.probe import called_modules
from tests.tiny import padded_batch, tiny_llama


class Half(nn.Module):
    """Calls one of two layers, and fails where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, fail=False):
        assert not torch.is_grad_enabled() and not self.training
        if fail:
            raise KeyError("failed")
        return self.used(x)


def test_modules_are_told_apart_by_whether_a_forward_calls_them():
    model = Half().train()
    assert called_modules(model, ["used", "unused"], {"x": torch.ones(2, 4)}) == {"used"}
    description = describe(model, RoutedConfig(target_modules=["used", "unused"]), {"x": torch.ones(2, 4)})
    assert description.uncalled == ["unused"]
    assert "not called by the given inputs: unused" in str(description)


@pytest.mark.parametrize("fail", [False, True])
def test_mode_and_hooks_are_afterwards_as_they_were(fail):
    model = Half().train()
    model.unused.eval()
    if fail:
        with pytest.raises(KeyError):
            called_modules(model, ["used"], {"x": torch.ones(2, 4), "fail": True})
    else:
        called_modules(model, ["used"], {"x": torch.ones(2, 4)})
    assert model.training and model.used.training and not model.unused.training
    assert not model.used._forward_pre_hooks and not model.unused._forward_pre_hooks


def test_a_description_runs_the_model_only_where_inputs_are_given():
    assert describe(tiny_llama(), RoutedConfig()).uncalled is None
    assert describe(tiny_llama(), RoutedConfig(), padded_batch([4])).uncalled == []
    with pytest.raises(ValueError, match=r"inputs='text' are no keyword arguments"):
        describe(tiny_llama(), RoutedConfig(), "text")
