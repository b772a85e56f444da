"""A whole model with router losses compiles to one graph, for training and evaluation, whatever the lengths."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend

from moe_peft import LoraMoeConfig, RoutedConfig, router_loss
from moe_peft.forward.joined_losses import WindowSums
from moe_peft.forward.objective import router_loss_values
from moe_peft.forward.tracker import find_tracker
from tests.tiny import tiny_llama

SHARED = {"r": 2, "num_experts": 4, "lora_dropout": 0.0, "init_weights": False, "router_aux_loss_coef": 1.0}
CONFIGS = {
    "loramoe": lambda: LoraMoeConfig(target_modules=["up_proj", "down_proj"], **SHARED),
    "top_k": lambda: RoutedConfig(
        router="top_k", top_k=2, router_z_loss_coef=0.3, target_modules=["up_proj", "down_proj"], **SHARED
    ),
    "groups": lambda: LoraMoeConfig(target_modules=["down_proj"], expert_groups=[0, 0, 1, 1], **SHARED),
    "tasks": lambda: RoutedConfig(scorer="task_table", target_modules=["down_proj"], **SHARED),
}
LENGTHS = (5, 7, 9, 12, 16)
MAX_GRAPHS = 3


def adapted(name):
    return get_peft_model(tiny_llama(seed=3, num_hidden_layers=1), CONFIGS[name]())


def batch(length):
    torch.manual_seed(length)
    ids = torch.randint(3, 30, (2, length))
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids, "use_cache": False}


def step(call, model, length):
    """Gradients of a step, with the router losses weighed by hand in every second length."""
    model.zero_grad()
    groups = {column: torch.tensor([1, 0]) for column in find_tracker(model).group_columns}
    loss = call(**batch(length), **groups).loss
    value = router_loss(model)
    (loss + 0.5 * value if length % 2 == 0 else loss).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, value.detach()


def assert_trains_as_without(name, backend, lengths):
    torch._dynamo.reset()
    plain, model = adapted(name).train(), adapted(name).train()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for length in lengths:
        (expected, value), (found, found_value) = step(plain, plain, length), step(compiled, model, length)
        torch.testing.assert_close(found_value, value)
        torch.testing.assert_close(router_loss_values(model), router_loss_values(plain))
        assert found.keys() == expected.keys() and any(".router" in key or "_router." in key for key in found)
        for key, gradient in expected.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=key: n + m)
    assert counter.frame_count <= MAX_GRAPHS


@pytest.mark.parametrize(
    "name", ["top_k", *(pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS if name != "top_k")]
)
def test_training_with_router_losses_is_one_graph_with_the_same_gradients(name):
    assert_trains_as_without(name, "aot_eager", LENGTHS)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_training_with_router_losses_is_one_graph_of_the_default_compiler(name):
    assert_trains_as_without(name, "inductor", LENGTHS)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_windows_of_any_length_are_as_few_graphs_with_the_same_gradients(backend):
    torch._dynamo.reset()
    fields = {"router": "top_k", "top_k": 2, "target_modules": ["down_proj"], **SHARED}
    config = RoutedConfig(load_balancing_scope="accumulation_window", **fields)
    plain, model = (get_peft_model(tiny_llama(seed=3, num_hidden_layers=1), config).train() for _ in range(2))
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for window in ((5, 7), (9,), (7, 9, 12, 16)):
        for own, call in ((plain, plain), (model, compiled)):
            find_tracker(own).window = WindowSums()
            own.zero_grad()
            for length in window:
                ((call(**batch(length)).loss + router_loss(own)) / len(window)).backward()
        for (name, expected), found in zip(plain.named_parameters(), model.parameters(), strict=True):
            if expected.requires_grad:
                torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert counter.frame_count <= MAX_GRAPHS


def test_evaluation_is_one_graph_with_the_same_outputs():
    torch._dynamo.reset()
    model = adapted("top_k").eval()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for length in LENGTHS:
            torch.testing.assert_close(compiled(**batch(length)).logits, model(**batch(length)).logits)
    assert counter.frame_count <= MAX_GRAPHS


@pytest.mark.slow
def test_the_losses_weight_may_change_between_compiled_steps():
    torch._dynamo.reset()
    plain, model = adapted("top_k").train(), adapted("top_k").train()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for scale in (1.0, 0.5, 0.25):
        for own in (plain, model):
            find_tracker(own).loss_scale = scale
        (expected, _), (found, _) = step(plain, plain, 5), step(compiled, model, 5)
        for key, gradient in expected.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5)
