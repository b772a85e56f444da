"""Adapters around blocks and experts keep their promises on every mixture-of-experts type of transformers."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel

from moe_peft.backbone.experts_call import ExpertsCall, experts_call
from moe_peft.backbone.structure import is_below, router_names
from moe_peft.layers import RoutedLayer
from tests.backbones.cases import (
    CASES,
    FOLLOWED_CASES,
    LINEAR_CASES,
    adapted,
    assert_adapter_alone_has_gradients,
    base_model,
    batch_for,
    marked,
)
from tests.backbones.models import FOLLOWED, NO_SLICES
from tests.slices import thinned

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
EMBEDDED_CASES = [
    *(marked(model_type, "perft-e") for model_type in FOLLOWED),
    *(marked(model_type, "esft") for model_type in NO_SLICES),
]
SLICED_CASES = [marked(model_type) for model_type in FOLLOWED if model_type not in NO_SLICES]


@pytest.mark.parametrize(("model_type", "method"), thinned(CASES, 0))
def test_step_zero_output_is_the_base_output(model_type, method):
    base, model = base_model(model_type), adapted(model_type, method, random=False)
    batch = batch_for(base)
    # Bit for bit; but copies of experts run on the rows that use them, and a GEMM of fewer rows may round otherwise.
    # So may experts that are computed with their pairs.
    tolerance = 1e-6 if method in ("esft", "expert-lora") else 0.0
    torch.testing.assert_close(model(**batch).logits, base(**batch).logits, rtol=0, atol=tolerance)
    assert not torch.equal(adapted(model_type, method)(**batch).logits, base(**batch).logits)


@pytest.mark.parametrize(("model_type", "method"), LINEAR_CASES)
def test_linear_adapters_start_at_the_base_output_and_leave_its_routing_alone(model_type, method):
    base, model = base_model(model_type), adapted(model_type, method, random=False)
    batch = batch_for(base)
    # The scaled tensor of a mixture of vectors is u * (1 + 0), to rounding.
    tolerance = 1e-5 if method == "mov" else 0.0
    torch.testing.assert_close(model(**batch).logits, base(**batch).logits, rtol=0, atol=tolerance)
    model = adapted(model_type, method)
    assert not torch.equal(model(**batch).logits, base(**batch).logits)
    routers = router_names(model.get_base_model())
    assert not [
        name
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, RoutedLayer) and is_below(name, routers)
    ]
    model.train()(**batch).loss.backward()
    assert all(p.grad is None or p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("model_type", "method"), thinned(CASES, 1))
def test_gradients_arrive_at_the_adapter_and_nowhere_else(model_type, method):
    model = adapted(model_type, method).train()
    model(**batch_for(model)).loss.backward()
    assert_adapter_alone_has_gradients(model)


@pytest.mark.parametrize(("model_type", "method"), thinned(CASES, 2))
def test_save_and_load_are_equal_to_the_last_bit(model_type, method, tmp_path):
    model = adapted(model_type, method)
    batch = batch_for(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base_model(model_type)), tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize(("model_type", "method"), thinned(FOLLOWED_CASES, 3))
def test_experts_implementations_agree(model_type, method):
    model = adapted(model_type, method)
    base = model.get_base_model()
    if not base._can_set_experts_implementation():
        pytest.skip("transformers has one implementation of these experts")
    logits = []
    for implementation in IMPLEMENTATIONS:
        base.set_experts_implementation(implementation)
        logits.append(model(**batch_for(model)).logits)
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("model_type", "method"), thinned(CASES, 4))
def test_generation_with_cache_equals_generation_without(model_type, method):
    model = adapted(model_type, method)
    ids = batch_for(model)["input_ids"]
    outputs = [
        model.generate(input_ids=ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*outputs)


@pytest.mark.parametrize(("model_type", "method"), EMBEDDED_CASES)
def test_embedded_adapters_follow_the_routing_that_the_experts_really_used(model_type, method):
    model = adapted(model_type, method)
    seen = []
    layers = [module for module in model.modules() if isinstance(module, RoutedLayer)]
    for layer in layers:
        layer.get_base_layer().register_forward_hook(
            lambda experts, args, kwargs, out, layer=layer: seen.append((layer, experts_call(args, kwargs), out)),
            with_kwargs=True,
        )
        layer.register_forward_hook(lambda layer, args, out: seen.append(out))
    model(**batch_for(model))
    assert len(seen) == 2 * len(layers)
    for (layer, call, base_out), out in zip(seen[::2], seen[1::2], strict=True):
        torch.testing.assert_close(out, base_out + embedded_sum(layer, call).view_as(out), rtol=1e-4, atol=1e-5)


def embedded_sum(layer: RoutedLayer, call: ExpertsCall) -> torch.Tensor:
    """sum_k w_k s B_i A_i x over the slots whose expert i has an adapter, token by token."""
    bank = layer.experts["default"]
    ids = layer.selections.get("default", range(layer.num_backbone_experts))
    place = {expert: position for position, expert in enumerate(ids)}
    x_TD = call.hidden.reshape(-1, call.hidden.shape[-1])
    out_TO = torch.zeros(len(x_TD), layer.out_features)
    for token, (experts, weights) in enumerate(zip(call.index.tolist(), call.weights, strict=True)):
        for expert, weight in zip(experts, weights, strict=True):
            if expert in place:
                A, B = bank.A[place[expert]], bank.B[place[expert]].T
                out_TO[token] += weight * bank.scaling * (B @ (A @ x_TD[token]))
    return out_TO


@pytest.mark.parametrize("model_type", SLICED_CASES)
def test_pairs_on_experts_equal_the_model_that_they_are_merged_into(model_type):
    model = adapted(model_type, "expert-lora")
    batch = batch_for(model)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", SLICED_CASES)
def test_trained_experts_equal_the_model_with_those_experts_replaced(model_type):
    model = adapted(model_type, "esft")
    batch = batch_for(model)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)
