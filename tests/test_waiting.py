"""No adapter makes an operator that waits for a device, in training or decoding, beyond those of the frozen model."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from moe_peft import accelerate_expert_lora, expert_parameters
from tests.contract.cases import METHODS, MODELS, groups_for, randomize
from tests.extend.cases import batch_for, context, inputs, layer_of, make, name_of, token
from tests.extend.combinations import covering, placed

# Operators whose result the processor reads, or whose output has a size that depends on values.
WAITING = {
    "_local_scalar_dense",
    "is_nonzero",
    "item",
    "nonzero",
    "masked_select",
    "equal",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
}
# Selected experts run the slots that are theirs, whose number the device knows; a compiled graph runs all.
OWN = {"esft": {"nonzero"}, "expert-lora-selected": {"nonzero"}}


class Waits(TorchDispatchMode):
    """Counts them."""

    def __init__(self):
        super().__init__()
        self.counts: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(own is not None and own.dtype in (torch.bool, torch.uint8) for own in indices)
        if name in WAITING or by_mask or (name == "repeat_interleave" and isinstance(args[0], torch.Tensor)):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def training(model, batch):
    with Waits() as waits:
        model.train()(**batch).loss.backward()
    return waits.counts


@torch.no_grad()
def decoding(model, batch):
    ids = batch["input_ids"][:1]
    cache = model.eval()(input_ids=ids[:, :-1], use_cache=True).past_key_values
    with Waits() as waits:
        model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
    return waits.counts


def built(name):
    """A backbone whose own experts, where it has some, wait for nothing."""
    model = MODELS[name].build()
    if MODELS[name].has_experts:
        model.set_experts_implementation("grouped_mm")
    return model


def frozen_inputs(model):
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
    return model


COUNTS: dict = {}


def counts_of_base(name, run):
    if (name, run) not in COUNTS:
        base = frozen_inputs(built(name)).requires_grad_(False)
        COUNTS[name, run] = run(base, MODELS[name].batch())
    return COUNTS[name, run]


def on(method):
    """A backbone with experts where the adapter is one of those, else one without."""
    return "llama" if MODELS["llama"].supports(method) else "olmoe"


@pytest.mark.parametrize("run", [training, decoding])
@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_waits_for_the_device_no_more_than_the_frozen_model(method, run):
    name = on(method)
    config = MODELS[name].config(method)
    model = get_peft_model(built(name), config)
    randomize(model)
    batch = MODELS[name].batch()
    if run is training:
        batch = {**batch, **groups_for(config, batch)}
        run(model, batch)  # the values of groups are looked at once
        model.zero_grad()
    more = run(model, batch) - counts_of_base(name, run)
    assert {key for key, count in more.items() if count > 0} <= OWN.get(method, set()), more


# An auction ends when every token has a place; tasks are looked at where they are on the processor already.
WAITING_PARTS = {
    "balanced_assignment": {"nonzero", "index", "_local_scalar_dense"},
    "task_table": {"_local_scalar_dense"},
}


def allowed(choice):
    return set().union(*(WAITING_PARTS.get(name, set()) for name in choice))


@pytest.mark.parametrize("choice", covering(1), ids=name_of)
def test_no_part_waits_for_the_device_in_training_or_for_one_token(choice):
    layer, known = layer_of(choice), context(training=True)
    x_TD, out_TO = inputs()
    layer.add("default", x_TD, out_TO, known)  # a part may look at something once
    with Waits() as waits:
        layer.add("default", x_TD.requires_grad_(), out_TO, known).sum().backward()
        with torch.no_grad():
            layer.add("default", x_TD[:1], out_TO[:1], token(context(), 0))
    assert set(waits.counts) <= allowed(choice), waits.counts


@pytest.mark.parametrize(
    "choice", [*placed(), *(pytest.param(own, marks=pytest.mark.slow) for own in covering(1))], ids=name_of
)
def test_no_part_of_a_model_waits_with_any_loss(choice):
    model, batch = make("llama", choice, train=True), batch_for("llama", choice, labels=True)
    training(model, batch)
    model.zero_grad()
    more = training(model, batch) - counts_of_base("llama", training)
    assert {name for name, count in more.items() if count > 0} <= allowed(choice), more


@pytest.mark.parametrize("run", [training, decoding])
def test_accelerated_stock_adapters_wait_no_more_than_the_frozen_model(run):
    base = built("olmoe")
    config = LoraConfig(r=2, target_modules=[], target_parameters=expert_parameters(base), task_type="CAUSAL_LM")
    model = accelerate_expert_lora(get_peft_model(base, config))
    more = run(model, MODELS["olmoe"].batch()) - counts_of_base("olmoe", run)
    assert not {name for name, count in more.items() if count > 0}, more


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: bool((x > 0).any()),
        lambda x: x.unique(),
        lambda x: x.repeat_interleave(x.long().abs()),
    ],
)
def test_what_waits_is_seen(wait):
    with Waits() as waits:
        wait(torch.tensor([1.0, -1.0]))
    assert waits.counts
