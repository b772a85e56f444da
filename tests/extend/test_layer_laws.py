"""Laws of parts on one layer, in float64: every triple of parts for the sum itself, every pair for the other laws."""

from __future__ import annotations

import copy

import pytest
import torch

from moe_peft.extend import EXPERTS, Place, Routing, TokenContext
from moe_peft.part import ABILITIES
from tests.compare import assert_same, random_routing

from .cases import (
    IN,
    NEEDING,
    NUM_EXPERTS,
    OUT,
    RANK,
    TRIPLES,
    close,
    config_of,
    context,
    context_needs,
    decide,
    inputs,
    layer_of,
    on_layers,
    on_pairs,
    parts_of,
    promised,
    token,
)


def noted(layer) -> list:
    """What the layer decides from here on."""
    seen, note = [], layer.note
    layer.note = lambda name, routing: seen.append(routing) or note(name, routing)
    return seen


def one_at_a_time(choice, layer, x_TD, base_TO, known):
    """The output by the parts alone: tokens decided one at a time where that is promised, experts one at a time."""
    bank = layer.experts["default"]
    if promised(choice, "causal", "batch_invariant", "decode_stateless"):
        rows = [decide(layer, x_TD[t : t + 1], token(known, t)).gate_matrix() for t in range(len(x_TD))]
        gates_TE = torch.cat(rows)
    else:
        gates_TE = decide(layer, x_TD, known).gate_matrix()
    return sum_of_experts(bank, x_TD, base_TO, gates_TE, known)


def sum_of_experts(bank, x_TD, base_TO, gates_TE, known):
    expected = base_TO
    for e in range(gates_TE.shape[1]):
        one_TE = torch.zeros(gates_TE.shape, dtype=gates_TE.dtype)
        one_TE[:, e] = 1
        alone = Routing(weights=one_TE, experts=None, logits=one_TE, probs=one_TE, context=known)
        expected = expected + gates_TE[:, e : e + 1] * (bank(x_TD, base_TO, alone) - base_TO)
    return expected


@on_pairs(0, TRIPLES)
def test_a_layer_equals_its_tokens_and_experts_one_at_a_time(choice):
    layer, known, (x_TD, base_TO) = layer_of(choice), context(), inputs()
    x_TD.requires_grad_()
    leaves = [x_TD, *(p for part in parts_of(layer) for p in part.parameters() if p.requires_grad)]
    found = layer.add("default", x_TD, base_TO, known)
    assert_same(found, one_at_a_time(choice, layer, x_TD, base_TO, known), leaves, leaves, tolerance=1e-10)
    again = layer.add("default", x_TD, base_TO.clone(), known, in_place=True)
    close(again, found, "combine: with in_place=True it must compute the same")


@on_pairs(1, TRIPLES)
def test_what_padding_holds_changes_no_other_token(choice):
    layer, (x_TD, base_TO) = layer_of(choice), inputs()
    for known in (context(), context(training=True)):
        other_TD = torch.where(known.valid[:, None], x_TD, 9.0)
        results = []
        for given in (x_TD, other_TD):
            torch.manual_seed(1)
            results.append(layer.add("default", given, base_TO.clone(), known)[known.valid])
        advice = "a scorer, gate or selector looks at tokens that are padding: leave those out where context.valid is"
        close(results[1], results[0], f"{advice} False (training={known.training})", 1e-12)


@on_pairs(2, TRIPLES)
def test_a_decision_has_the_shapes_and_the_names_that_the_contract_says(choice):
    layer, (x_TD, base_TO) = layer_of(choice), inputs()
    seen, num_tokens = noted(layer), len(x_TD)
    for training in (False, True):
        layer.add("default", x_TD, base_TO.clone(), context(training))
    router = layer.router["default"]
    for routing in (decide(layer, x_TD, context()), *seen):
        num_choices = layer.experts["default"].num_choices
        assert routing.num_experts == num_choices >= NUM_EXPERTS
        assert routing.probs.shape == (num_tokens, num_choices), "probs have a column for each expert, and no other"
        assert routing.logits.shape[0] == num_tokens
        columns = num_choices if routing.experts is None else routing.experts.shape[1]
        assert routing.weights.shape == (num_tokens, columns)
        if routing.experts is not None:
            assert routing.experts.dtype == torch.int64 and routing.experts.min() >= 0
            assert routing.experts.max() <= num_choices, "an empty slot holds the index E, and no larger one"
            assert columns == router.num_slots, "num_slots of the selector is the number of columns"
        for tensor in (routing.weights, routing.probs, routing.logits, *routing.extras.values()):
            assert torch.isfinite(tensor).all() and tensor.shape[0] == num_tokens
        assert (routing.probs >= 0).all(), "a gate gives no negative probability; experts that are left out have zero"
        words = router.gives - ABILITIES
        assert words <= routing.extras.keys(), f"gives names {sorted(words)}, but extras has {sorted(routing.extras)}"


@on_pairs(3, TRIPLES)
def test_no_token_is_an_empty_output(choice):
    layer = layer_of(choice)
    x_TD, base_TO = torch.zeros(0, IN).double().requires_grad_(), torch.zeros(0, OUT).double()
    empty = torch.zeros(0, dtype=torch.long)
    for training in (False, True):
        known = context(training, valid=empty.bool(), sequences=empty, token_ids=empty, prompt=empty.bool())
        found = layer.add("default", x_TD, base_TO.clone(), known)
        assert found.shape == (0, OUT)
        found.sum().backward()


@on_pairs(4, TRIPLES)
def test_a_training_pass_decides_like_evaluation_where_nothing_may_perturb_it(choice):
    layer, (x_TD, _) = layer_of(choice), inputs()
    layer.router["default"].perturbs_training = False
    decided = [decide(layer, x_TD, context(training)).gate_matrix() for training in (False, True, False)]
    advice = "noise, sampling and capacity belong to passes whose context says training; ask that context alone"
    assert torch.equal(decided[0], decided[1]), advice
    assert torch.equal(decided[0], decided[2]), "evaluation decides the same twice: keep no state, draw no numbers"


@on_pairs(5, TRIPLES)
def test_scores_stay_float32_in_16_bit_layers_and_outputs_do_not(choice):
    layer = layer_of(choice).to(torch.bfloat16)
    for part in parts_of(layer):
        for parameter in part.parameters():
            parameter.data = parameter.data.bfloat16()
    seen, (x_TD, base_TO) = noted(layer), inputs(dtype=torch.bfloat16)
    found = layer.add("default", x_TD, base_TO, context(training=True))
    # A layer whose experts all weigh the same makes no decision.
    for routing in (decide(layer, x_TD, context(training=True)), *seen):
        for name in ("logits", "probs", "weights"):
            dtype = getattr(routing, name).dtype
            assert dtype == torch.float32, f"{name} of a bfloat16 layer are {dtype}: cast input and weights to float32"
        assert all(tensor.dtype == torch.float32 for tensor in routing.extras.values()), "extras are float32"
    assert found.dtype == torch.bfloat16, "combine returns the dtype of the base output"
    found.float().sum().backward()
    for part in parts_of(layer):
        for name, p in part.named_parameters():
            assert not p.requires_grad or torch.isfinite(p.grad).all(), name


@on_pairs(6, TRIPLES)
def test_tensors_alone_carry_what_a_part_has_become(choice):
    layer, known, (x_TD, base_TO) = layer_of(choice), context(), inputs()
    expected = layer.add("default", x_TD, base_TO.clone(), known)
    copies = copy.deepcopy(layer)
    assert torch.equal(copies.add("default", x_TD, base_TO.clone(), known), expected), "a copy computes the same"
    built = config_of(choice, losses=False).build(Place("linear", IN, OUT))
    for made, part in ((built.experts, layer.experts["default"]), (built.router, layer.router["default"])):
        kind = type(part).__name__
        assert not dict(part.named_buffers()), f"{kind}: buffers are not saved with an adapter; make them frozen"
        flat = [name for name, _ in part.named_parameters() if "." in name]
        assert not flat, f"{kind}: {flat} lie in modules below; an adapter's tensors are attributes of the part itself"
        made.double().load_state_dict(part.state_dict())
    layer.experts["default"], layer.router["default"] = built.experts, built.router
    advice = "parts of the same configuration and tensors compute something else: no state outside of parameters"
    assert torch.equal(layer.add("default", x_TD, base_TO.clone(), known), expected), advice


@on_layers(NEEDING)
def test_a_part_that_is_not_told_what_it_needs_says_so_or_does_without(choice):
    layer, (x_TD, base_TO) = layer_of(choice), inputs()
    try:
        layer.add("default", x_TD, base_TO, TokenContext())
    except ValueError as error:
        needs = sorted(context_needs(choice))
        assert len(str(error)) > 40, f"say which of {needs} is missing and how a batch brings it, not {error}"


@pytest.mark.parametrize("kind", sorted({choice[3] for choice in TRIPLES}))
@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("num_tokens", [1, 13])
def test_what_experts_add_is_the_sum_of_what_each_adds_alone_by_its_weight(kind, top_k, num_tokens):
    cls = EXPERTS[kind]
    torch.manual_seed(0)
    given = {name: value for name, value in {"scaling": 1.7, "init_weights": False}.items() if name in cls.fields}
    bank = cls(IN, OUT, num_experts=4, r=RANK, **given).double()
    x_TD = torch.randn(num_tokens, IN).double().requires_grad_()
    base_TO, routing = torch.randn(num_tokens, OUT).double(), random_routing(num_tokens, bank.num_choices, top_k)
    expected = sum_of_experts(bank, x_TD, base_TO, routing.gate_matrix(), routing.context)
    leaves = [x_TD, routing.logits, *(p for p in bank.parameters() if p.requires_grad)]
    assert_same(bank(x_TD, base_TO, routing), expected, leaves, leaves, tolerance=1e-10)
