"""The estimate of a training step's memory is what a step on the CPU takes, within a fifth."""

from __future__ import annotations

import weakref

import pytest
import torch
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import OlmoeForCausalLM

import moe_peft
from moe_peft.backbone.without_weights import meta_model
from moe_peft.tools.memory import cache_name, training_memory
from tests.contract.cases import tiny_olmoe
from tests.tiny import tiny_llama

SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 6, "vocab_size": 96}
BATCH, LENGTH = 4, 96


class Peak(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and the most there were."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.most = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor)
        return out

    def count(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.gone, key, size)

    def gone(self, key, size):
        self.alive.discard(key)
        self.now -= size


def step_bytes(base, config, checkpointing):
    """Weights and the most that a step needed beside them."""
    model = get_peft_model(base, config).train()
    model.config.use_cache = False
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    ids = torch.randint(3, base.config.vocab_size, (BATCH, LENGTH))
    for _ in range(2):  # the first step makes the optimizer's state
        with Peak() as peak:
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = sum(t.numel() * t.element_size() for own in optimizer.state.values() for t in own.values() if t.dim())
    return weights + peak.most + state


def grouped_olmoe():
    config = tiny_olmoe().config
    sizes = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 6, "num_experts": 8, "vocab_size": 96}
    for name, value in sizes.items():
        setattr(config, name, value)
    model = OlmoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    return model


CASES = {
    "loramoe": (lambda: tiny_llama(**SIZES), moe_peft.LoraMoeConfig),
    "routed": (lambda: tiny_llama(**SIZES), moe_peft.RoutedConfig),
    "mov": (lambda: tiny_llama(**SIZES), moe_peft.MovConfig),
    "perft": (grouped_olmoe, moe_peft.PerftConfig),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_what_a_step_takes_within_a_fifth(case, checkpointing):
    make, config = CASES[case]
    base = make()
    base.config.architectures = [type(base).__name__]
    found = training_memory(
        meta_model(base.config), config(task_type="CAUSAL_LM"), batch_size=BATCH, length=LENGTH, dtype=torch.float32
    )
    measured = step_bytes(base, config(task_type="CAUSAL_LM"), checkpointing)
    assert found.total(checkpointing=checkpointing) == pytest.approx(measured, rel=0.2)


def test_four_bits_and_checkpointing_take_less_and_add_up():
    found = training_memory(meta_model(tiny_llama(**SIZES).config), moe_peft.LoraMoeConfig(task_type="CAUSAL_LM"))
    parts = found.adapter + found.gradients + found.optimizer
    assert found.total() == found.weights + parts + found.activations
    assert (
        found.total(four_bit=True, checkpointing=True) == found.weights_4bit + parts + found.activations_checkpointed
    )
    assert found.weights_4bit < found.weights and found.activations_checkpointed < found.activations


def test_an_adapter_whose_pass_depends_on_values_says_so():
    config = moe_peft.EsftConfig(task_type="CAUSAL_LM", experts={"0": [0, 1]})
    found = training_memory(meta_model(tiny_olmoe().config), config)
    assert found.activations is None and found.total() is None and "unknown" in str(found)


@pytest.mark.parametrize("sizes", [{"length": 0}, {"batch_size": -1}, {"length": 1.5}])
def test_sizes_must_be_positive(sizes):
    with pytest.raises(ValueError, match="must be a whole number of at least 1"):
        training_memory(meta_model(tiny_llama().config), moe_peft.LoraMoeConfig(task_type="CAUSAL_LM"), **sizes)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_given_by_the_name_that_the_models_forward_has(name):
    model = type("Model", (torch.nn.Module,), {"forward": eval(f"lambda self, input_ids, {name}=None: None")})()
    assert cache_name(model) == name
    assert cache_name(tiny_llama()) in ("cache", "past_key_values")
