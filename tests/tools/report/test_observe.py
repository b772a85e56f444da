"""Observers see every decision and are gone afterwards, whatever ends the forward."""

from __future__ import annotations

import pytest
import torch

from moe_peft.forward.find import find_trackers
from moe_peft.tools.report.observe import needs_decoder_input, observing, run
from tests.contract.cases import MODELS
from tests.tiny import padded_batch, tiny_llama, tiny_t5

from .conftest import routed_model


def test_observers_leave_with_the_block_also_after_an_error():
    for model in (routed_model(), MODELS["olmoe"].build()):
        seen: list = []
        with pytest.raises(RuntimeError, match="stop"), observing(model, lambda *own, seen=seen: seen.append(own)):
            run(model, padded_batch([4, 2]))
            raise RuntimeError("stop")
        assert seen and not any(tracker.observers for tracker in find_trackers(model))
        hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
        count = len(seen)
        run(model, padded_batch([4, 2]))
        assert len(seen) == count and not any("note_mask" in repr(hook) for hook in hooks)


def test_columns_that_the_model_does_not_take_are_left_out():
    run(tiny_llama(), {**padded_batch([4]), "labels": torch.ones(1, 4).long(), "task": torch.ones(1), "text": ["w"]})
    run(tiny_t5(), {**padded_batch([4]), "labels": torch.ones(1, 3).long()})
    assert needs_decoder_input(tiny_t5()) and not needs_decoder_input(tiny_llama())
