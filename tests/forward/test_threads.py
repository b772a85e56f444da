"""Threads on one model: each has its own context, adapters of rows, telemetry and recomputations."""

from __future__ import annotations

import sys
import threading
from contextlib import contextmanager

import pytest
import torch
from peft import get_peft_model

from moe_peft import LoraMoeConfig, MoloraConfig, MovConfig, PerftConfig, RoutedConfig, router_loss
from moe_peft.forward.tracker import find_tracker
from moe_peft.telemetry.functions import record
from tests.contract.cases import randomize
from tests.tiny import padded_batch, tiny_bert, tiny_llama

CONFIGS = {
    "routed": lambda: RoutedConfig(num_experts=3, r=2),
    "loramoe": lambda: LoraMoeConfig(num_experts=3, r=2),
    "molora": lambda: MoloraConfig(num_experts=3, r=2),
    "mov": lambda: MovConfig(num_experts=3),
    "perft": lambda: PerftConfig(num_experts=3, top_k=2, r=2),
}


@pytest.fixture(autouse=True)
def switching_threads_all_the_time():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def in_threads(*functions):
    """Run the functions at the same time; their results, or the first error."""
    results, errors = [None] * len(functions), []

    def run(number):
        try:
            results[number] = functions[number]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


@pytest.mark.parametrize("kind", CONFIGS)
def test_each_thread_gets_the_adapters_of_its_rows(kind):
    model = get_peft_model(tiny_llama(), CONFIGS[kind](), adapter_name="a")
    model.add_adapter("b", CONFIGS[kind]())
    randomize(model)
    model.eval()
    batch = padded_batch([5, 3])
    rows = {"a": ["a", "a"], "b": ["b", "b"], "mixed": ["b", "a"], "base": ["__base__", "a"]}
    with torch.no_grad():
        expected = {name: model(**batch, adapter_names=names).logits for name, names in rows.items()}
        plain = model(**batch).logits
    assert not torch.allclose(expected["a"], expected["b"])

    def served(name):
        def work():
            for _ in range(15):
                with torch.no_grad():
                    named = {} if name is None else {"adapter_names": rows[name]}
                    found = model(**batch, **named).logits
                torch.testing.assert_close(found, plain if name is None else expected[name])

        return work

    in_threads(*(served(name) for name in (*rows, None)))
    assert not find_tracker(model)._busy


def test_modules_that_peft_saves_whole_follow_the_rows_of_each_thread():
    config = {"num_experts": 3, "r": 2, "task_type": "SEQ_CLS", "target_modules": ["query"]}
    model = get_peft_model(tiny_bert(), RoutedConfig(**config), adapter_name="a")
    model.add_adapter("b", RoutedConfig(**config))
    for number, parameter in enumerate(model.parameters()):
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    model.eval()
    batch = padded_batch([5, 3])

    def hooks():
        return sum(len(module._forward_pre_hooks) for module in model.modules())

    before = hooks()
    with torch.no_grad():
        expected = {name: model(**batch, adapter_names=[name] * 2).logits for name in "ab"}
        for name in "ab":
            model.set_adapter(name)
            torch.testing.assert_close(model(**batch).logits, expected[name])

    def served(name):
        def work():
            for _ in range(15):
                with torch.no_grad():
                    found = model(**batch, adapter_names=[name] * 2).logits
                torch.testing.assert_close(found, expected[name])

        return work

    in_threads(*(served(name) for name in "ab"))
    assert hooks() == before


def test_telemetry_records_the_forwards_of_its_own_thread():
    model = get_peft_model(tiny_llama(), CONFIGS["routed"]()).eval()

    def recorded(length):
        def work():
            with torch.no_grad():
                for _ in range(10):
                    with record(model) as routings:
                        model(**padded_batch([length]))
                    assert all([len(r.weights) for r in made] == [length] for made in routings.values())

        return work

    in_threads(recorded(3), recorded(5), recorded(4))
    assert not find_tracker(model).observers


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradients_of_each_thread_are_those_of_its_own_batch(reentrant):
    """Gradients taken with autograd.grad do not meet in the parameters."""
    config = LoraMoeConfig(
        num_experts=4, r=2, lora_dropout=0.0, expert_groups=[0, 1, 1, 0], router_aux_loss_coef=1.0, init_weights=False
    )
    model = get_peft_model(tiny_llama(), config).double().train()
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    lock = threading.Lock()
    batches = [
        {**padded_batch([6, 2], seed=1), "task_type": torch.tensor([0, 1])},
        {**padded_batch([3, 5, 4], seed=2), "task_type": torch.tensor([1, 1, 0])},
    ]

    def step(batch):
        loss = model(**batch, use_cache=False).logits.square().mean()
        value = router_loss(model).detach()
        loss.backward()
        return value

    expected = []
    for batch in batches:
        model.zero_grad()
        value = step(batch)
        expected.append((value, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    model.zero_grad()
    with lock:
        values = in_threads(*(lambda batch=batch: step(batch) for batch in batches))
    for value, (alone, _) in zip(values, expected, strict=True):
        torch.testing.assert_close(value, alone)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            added = expected[0][1][name] + expected[1][1][name]
            torch.testing.assert_close(parameter.grad, added, rtol=1e-6, atol=1e-12)


@contextmanager
def in_use_by_another_thread(model, layer):
    """Stop a forward of another thread after one of the model's modules."""
    inside, go_on = threading.Event(), threading.Event()

    def wait(module, args, output):
        inside.set()
        go_on.wait(60)

    handle = layer.register_forward_hook(wait)
    thread = threading.Thread(target=lambda: model(**padded_batch([3])))
    thread.start()
    inside.wait(60)
    try:
        yield
    finally:
        go_on.set()
        thread.join()
        handle.remove()


def test_changing_adapters_under_the_forward_of_another_thread_is_refused():
    model = get_peft_model(tiny_llama(), CONFIGS["routed"](), adapter_name="a")
    model.add_adapter("b", CONFIGS["routed"]())
    model.eval()
    with in_use_by_another_thread(model, model.base_model.model.model.layers[0]):
        for change in (
            lambda: model.set_adapter("b"),
            lambda: model.base_model.set_adapter(["a", "b"]),
            lambda: model.delete_adapter("b"),
            lambda: model.disable_adapter().__enter__(),
            lambda: model.merge_adapter(),
            lambda: model.unload(),
        ):
            with pytest.raises(RuntimeError, match="a forward that runs in the thread"):
                change()
            assert model.active_adapter == "a"
        assert model.base_model.active_adapters == ["a"] and set(model.peft_config) == {"a", "b"}
    model.set_adapter("b")
    assert model.active_adapter == "b"


def test_changing_adapters_through_transformers_meanwhile_is_refused_too():
    model = tiny_llama().eval()
    for name in ("a", "b"):
        model.add_adapter(CONFIGS["routed"](), name)
    with in_use_by_another_thread(model, model.model.layers[0]):
        for change in (
            lambda: model.set_adapter("a"),
            lambda: model.delete_adapter("a"),
            lambda: model.disable_adapters(),
            lambda: model.enable_adapters(),
        ):
            with pytest.raises(RuntimeError, match="a forward that runs in the thread"):
                change()
            assert model.active_adapters() == ["b"]
    model.set_adapter("a")
    assert model.active_adapters() == ["a"]
