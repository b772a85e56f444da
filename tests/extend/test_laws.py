"""Laws for whatever is registered: scorers, gates, selectors, expert kinds, losses; on linears and sparse blocks."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model

from moe_peft import RoutedConfig, routed_layers, router_loss
from moe_peft.extend import EXPERTS, GATES, SCORERS, SELECTORS, TokenContext
from moe_peft.part import Part
from moe_peft.routers import router_parts
from moe_peft.telemetry import record
from tests.compare import assert_same, random_routing
from tests.contract.cases import MODELS, randomize

from . import registered
from .combinations import choices, losses_for

with registered():
    CHOICES = choices()
PLACES = {"llama": {"target_modules": ["q_proj", "down_proj"]}, "olmoe": {"wraps": "block"}}
CASES = [(place, choice) for place in PLACES for choice in CHOICES]
cases = pytest.mark.parametrize(("place", "choice"), CASES, ids=[f"{p}-{'-'.join(c)}" for p, c in CASES])


@pytest.fixture(autouse=True)
def _registered():
    with registered():
        yield


def classes_of(choice) -> list[type[Part]]:
    router, scorer, gate, experts = choice
    return [*router_parts(router, scorer, gate), EXPERTS[experts]]


def context_needs(choice) -> frozenset[str]:
    return frozenset().union(*(part.context_needs for part in classes_of(choice)))


def promises(choice, name: str) -> bool:
    """Whether all parts keep a promise, of those that need nothing but the tokens."""
    return all(getattr(part, name) for part in classes_of(choice)) and not context_needs(choice)


def make(place, choice, *, train=False, dtype=torch.float64, random=True, **fields):
    router, scorer, gate, experts = choice
    torch.manual_seed(0)
    losses = dict.fromkeys(losses_for(choice), 0.1)
    settings = {"num_experts": 3, "r": 2, "router_aux_loss_coef": 0.0, "losses": losses or None}
    names = {"router": router, "scorer": scorer, "gate": gate, "experts": experts}
    config = RoutedConfig(task_type="CAUSAL_LM", **{**PLACES[place], **settings, **names, **fields})
    model = get_peft_model(MODELS[place].build(), config).to(dtype)
    if random:
        randomize(model)
    return model.train(train)


def parts_of(model):
    return [p for layer in routed_layers(model) for p in (*layer.experts.values(), *layer.router.values())]


def batch_for(place, choice, *, labels=False):
    batch = MODELS[place].batch()
    groups = {"task_type": torch.tensor([0, 1, 0])} if context_needs(choice) else {}
    return {key: value for key, value in batch.items() if labels or key != "labels"} | groups


@cases
def test_the_adapted_model_starts_as_the_base_bit_for_bit(place, choice):
    model, batch = make(place, choice, random=False), batch_for(place, choice)
    with torch.no_grad():
        found = model(**batch).logits
        with model.disable_adapter():
            assert torch.equal(found, model(**batch).logits)


@cases
def test_every_tensor_that_trains_gets_a_gradient_and_no_other(place, choice):
    model = make(place, choice, train=True)
    model(**batch_for(place, choice, labels=True)).loss.backward()
    for part in parts_of(model):
        for name, parameter in part.named_parameters():
            assert parameter.requires_grad == (name not in part.frozen), name
            assert (parameter.grad is None) == (name in part.frozen), name
            assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
    assert torch.isfinite(router_loss(model))
    names = {name for layer in routed_layers(model) for name in layer.objectives["default"].losses}
    assert names == set(losses_for(choice))


@cases
def test_later_tokens_and_other_rows_change_nothing_where_the_parts_say_so(place, choice):
    model, batch = make(place, choice), batch_for(place, choice)
    if promises(choice, "causal"):
        changed = {**batch, "input_ids": batch["input_ids"].clone()}
        changed["input_ids"][:, 5] = (changed["input_ids"][:, 5] + 1) % 60 + 3
        with torch.no_grad():
            one, other = model(**batch).logits[:, :5], model(**changed).logits[:, :5]
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    if promises(choice, "batch_invariant"):
        with torch.no_grad():
            alone = model(input_ids=batch["input_ids"][:1]).logits
            torch.testing.assert_close(alone, model(**batch).logits[:1], rtol=0, atol=1e-9)


@cases
def test_decoding_with_a_cache_equals_the_full_forward_where_the_parts_say_so(place, choice):
    if not promises(choice, "decode_stateless"):
        pytest.skip("makes no such promise")
    model = make(place, choice)
    ids = batch_for(place, choice)["input_ids"][:1]
    with torch.no_grad():
        whole, cache, steps = model(input_ids=ids).logits, None, []
        for position in range(ids.shape[1]):
            out = model(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-9)


@cases
def test_checkpointing_of_either_kind_changes_neither_loss_nor_gradient(place, choice):
    results = []
    for reentrant in (None, False, True):
        model = make(place, choice, train=True)
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        loss = model(**batch_for(place, choice, labels=True)).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for part in parts_of(model) for p in part.parameters())])
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=1e-9, atol=1e-12)


@cases
def test_a_saved_adapter_loads_bit_for_bit(place, choice, tmp_path):
    model = make(place, choice, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(MODELS[place].build(), tmp_path)
    own = {key: tensor for key, tensor in model.state_dict().items() if ".routed_" in key}
    found = {key: tensor for key, tensor in again.state_dict().items() if ".routed_" in key}
    assert own.keys() == found.keys() and all(torch.equal(own[key], found[key]) for key in own)


@cases
def test_scores_are_float32_in_a_16_bit_model(place, choice):
    model, batch = make(place, choice, dtype=torch.bfloat16), batch_for(place, choice)
    for part in parts_of(model):
        for parameter in part.parameters():
            parameter.data = parameter.data.bfloat16()
    with torch.no_grad(), record(model) as routings:
        model(**batch)
    made = [routing for own in routings.values() for routing in own]
    assert made and all(routing.logits.dtype == routing.probs.dtype == torch.float32 for routing in made)


@cases
def test_rows_with_adapter_names_equal_those_of_the_adapter_alone(place, choice):
    model, batch = make(place, choice), batch_for(place, choice)
    names = ["default", "__base__", "default"]
    with torch.no_grad():
        mixed, own = model(**batch, adapter_names=names).logits, model(**batch).logits
        with model.disable_adapter():
            base = model(**batch).logits
    torch.testing.assert_close(mixed, torch.stack([own[0], base[1], own[2]]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", sorted({choice[3] for choice in CHOICES}))
@pytest.mark.parametrize("top_k", [None, 2])
def test_what_experts_add_is_the_sum_of_what_each_adds_alone_by_its_weight(kind, top_k):
    cls = EXPERTS[kind]
    torch.manual_seed(0)
    given = {name: value for name, value in {"scaling": 1.7, "init_weights": False}.items() if name in cls.fields}
    bank = cls(7, 5, num_experts=4, r=3, **given).double()
    x, base = torch.randn(13, 7).double().requires_grad_(), torch.randn(13, 5).double()
    routing = random_routing(13, bank.num_choices, top_k)
    expected = base
    for e in range(bank.num_choices):
        one = torch.zeros(13, bank.num_choices).double()
        one[:, e] = 1
        alone = bank(x, base, type(routing)(weights=one, experts=None, logits=one, probs=one)) - base
        expected = expected + routing.gate_matrix()[:, e : e + 1] * alone
    leaves = [x, routing.logits, *bank.parameters()]
    assert_same(bank(x, base, routing), expected, leaves, leaves, tolerance=1e-10)


def test_all_registered_parts_take_part():
    for position, registry in enumerate((SELECTORS, SCORERS, GATES, EXPERTS)):
        assert set(registry) <= {choice[position] for choice in CHOICES}


def test_no_token_is_an_empty_decision():
    for choice in CHOICES:
        if context_needs(choice):
            continue
        layer = routed_layers(make("llama", choice))[0]
        x = torch.zeros(0, layer.in_features).double()
        bank, router = layer.experts["default"], layer.router["default"]
        read = bank.activations(bank.prepare(x, TokenContext())) if router.reads == "activations" else x
        assert router(read, TokenContext()).gate_matrix().shape == (0, bank.num_choices)
