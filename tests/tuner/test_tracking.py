"""The innermost model around all places keeps the tracker, and the last adapter that goes takes it along."""

from __future__ import annotations

import pytest
from peft import get_peft_model
from torch import nn

from moe_peft import RoutedConfig, routed_layers
from moe_peft.forward.find import TRACKER_ATTRIBUTE, find_tracker, find_trackers
from moe_peft.tuner.tracking import detach_unused, tracker_around
from tests.tiny import tiny_llama


def adapted() -> nn.Module:
    return get_peft_model(tiny_llama(), RoutedConfig(target_modules=["q_proj"], num_experts=2)).base_model.model


def test_the_tracker_of_an_adapter_is_that_of_the_innermost_model_around_all_its_places():
    inner, outer = adapted(), nn.ModuleDict({"a": adapted(), "b": tiny_llama()})
    assert tracker_around(inner, ["model.layers.0.self_attn.k_proj"]) is find_tracker(inner)
    assert tracker_around(outer, ["a.model.layers.0.mlp", "a.model.layers.1.mlp"]) is find_tracker(outer["a"])
    assert tracker_around(outer, ["a.model.layers.0.mlp", "b.model.layers.0.mlp"]) is None
    assert tracker_around(outer, ["ab.model"]) is None and tracker_around(tiny_llama(), ["model"]) is None


def test_a_tracker_goes_with_the_last_layer_and_leaves_calls_as_they_were():
    plain, model = tiny_llama(), adapted()
    detach_unused(model)
    assert len(find_trackers(model)) == 1
    for layer in routed_layers(model):
        parent, _, name = layer.place.rpartition(".")
        setattr(model.get_submodule(parent), name, layer.get_base_layer())
    detach_unused(model)
    assert find_trackers(model) == [] and TRACKER_ATTRIBUTE not in model.__dict__
    for own, expected in zip(model.modules(), plain.modules(), strict=True):
        assert len(own._forward_hooks) == len(expected._forward_hooks) and "forward" not in vars(own)


@pytest.mark.parametrize("operation", ["set_adapter", "delete_adapter"])
def test_a_thread_inside_a_forward_is_waited_for_by_name(operation):
    import threading

    from moe_peft.tuner.tracking import refuse_in_use

    model, inside, done = adapted(), threading.Event(), threading.Event()

    def run() -> None:
        def hold(module, args):
            inside.set()
            done.wait(20)

        handle = routed_layers(model)[0].register_forward_pre_hook(hold)
        model(**model.dummy_inputs)
        handle.remove()

    thread = threading.Thread(target=run, name="reader")
    thread.start()
    assert inside.wait(20)
    try:
        with pytest.raises(RuntimeError, match=f"{operation} would change the adapters .* in the thread 'reader'"):
            refuse_in_use(model, operation)
    finally:
        done.set()
        thread.join()
    refuse_in_use(model, operation)
