"""What every registered part says of itself is true: its options, fields, shapes, and the parameters that it names."""

from __future__ import annotations

import inspect

import pytest
import torch
from peft import get_peft_model

from moe_peft import RoutedConfig
from moe_peft.extend import EXPERTS, GATES, LOSSES, ROUTERS, SCORERS, SELECTORS, Place, Routing
from moe_peft.part import ModulePart
from moe_peft.tools.other_experts import with_experts
from tests.contract.cases import randomize
from tests.tiny import OneLinear

from . import registered
from .cases import (
    IN,
    NUM_EXPERTS,
    OUT,
    PAIRS,
    PARTS,
    RANK,
    close,
    config_of,
    context,
    decide,
    inputs,
    layer_of,
    on_layers,
    promised,
)
from .combinations import fitting

REGISTRIES = {
    "scorer": SCORERS,
    "gate": GATES,
    "selector": SELECTORS,
    "router": ROUTERS,
    "experts": EXPERTS,
    "loss": LOSSES,
}
with registered():
    NAMED = [(axis, name) for axis, registry in REGISTRIES.items() for name in registry]
CONTEXT = {"sequences", "groups", "token_ids", "prompt", "cached"}
every_part = pytest.mark.parametrize(("axis", "name"), NAMED, ids=["-".join(named) for named in NAMED])


def keywords_of(cls) -> set[str]:
    """Keywords that a constructor takes, those of its bases where it passes what it does not know on to them."""
    found = set()
    for own in cls.__mro__:
        if "__init__" in vars(own):
            parameters = inspect.signature(own.__init__).parameters.values()
            found |= {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
            if all(p.kind is not p.VAR_KEYWORD for p in parameters):
                break
    return found


NUM_SAMPLES = 64
with registered():
    FITTING = fitting()
SCORING = {name: next(choice for choice in FITTING if choice[1] == name) for name in SCORERS}


@pytest.mark.parametrize("name", SCORING)
def test_a_scorer_says_whether_its_scores_are_logarithms_of_probabilities(name):
    layer, above = layer_of(SCORING[name]), False
    for seed in range(8):
        logits = decide(layer, inputs(seed)[0], context(seed % 2 == 0)).logits
        above |= bool((logits > 0).any())
    assert above != SCORERS[name].log_scores


@pytest.mark.parametrize("name", GATES)
def test_a_gate_says_whether_it_needs_scores_above_zero(name):
    logits_TE = (-5 * torch.rand(12, NUM_EXPERTS).double()).requires_grad_()
    probs_TE = GATES[name]()(logits_TE, context(training=True))
    assert bool(probs_TE.any()) != GATES[name].needs_positive
    torch.autograd.backward(probs_TE.square().sum())
    assert bool(logits_TE.grad.any()) != GATES[name].needs_positive


def _marks(gate) -> list:
    """Gates that pass every score cannot leave an expert out: they are looked at in `make slow`."""
    return [] if gate.needs_positive else [pytest.mark.slow]


def dead_at_the_start(scorer: str, gate: str, seed: int) -> list[int]:
    """Experts that no token of a task uses, and whose scores get no gradient from one, as a router starts."""
    choice = next(own for own in FITTING if own[0] in ("dense", "positive") and own[1:3] == (scorer, gate))
    torch.manual_seed(seed)
    built = config_of(choice, losses=False).build(Place("linear", IN, OUT))
    x_TD = torch.randn(NUM_SAMPLES, IN)
    known = context(
        groups=torch.arange(NUM_SAMPLES) % 2,
        token_ids=torch.arange(NUM_SAMPLES),
        **{"valid": torch.ones(NUM_SAMPLES, dtype=torch.bool), "prompt": torch.ones(NUM_SAMPLES, dtype=torch.bool)},
        **{"sequences": torch.arange(NUM_SAMPLES), "num_sequences": NUM_SAMPLES, "num_rows": NUM_SAMPLES},
    )
    read = x_TD
    if built.router.reads == "activations":
        read = built.experts.activations(built.experts.prepare(x_TD, known))
    logits_TE = built.router.scores(read, known).detach().requires_grad_()
    probs_TE = built.router.gate(logits_TE, known)
    torch.autograd.backward(probs_TE.square().sum())
    for task in (0, 1):
        alive_E = probs_TE[task::2].any(0) | logits_TE.grad[task::2].any(0)
        if not alive_E.all():
            return alive_E.logical_not().nonzero().flatten().tolist()
    return []


@pytest.mark.parametrize("name", [pytest.param(name, marks=_marks(gate)) for name, gate in GATES.items()])
def test_no_expert_starts_where_no_token_could_ever_make_it_learn(name):
    for scorer in sorted({own[1] for own in FITTING if own[2] == name and own[0] in ("dense", "positive")}):
        for seed in range(6):
            dead = dead_at_the_start(scorer, name, seed)
            assert not dead, f"{scorer}: experts {dead} could never learn under {name}: start their scores above zero"


@every_part
def test_options_have_a_default_that_fits_and_say_what_they_are(axis, name):
    cls = REGISTRIES[axis][name]
    names = [option.name for option in cls.options]
    assert len(set(names)) == len(names)
    for option in cls.options:
        assert option.accepts(option.default), f"{option.name}: its own default {option.default!r} does not fit"
        assert option.help.strip() and option.expected.strip(), f"{option.name} needs help and expected"
        assert not option.accepts(object()), f"{option.name}: fits takes anything; a wrong type must be refused"
        assert not option.accepts(float("nan")), f"{option.name}: fits takes NaN"


@every_part
def test_fields_and_options_are_keywords_of_the_constructor(axis, name):
    cls = REGISTRIES[axis][name]
    keywords, config = keywords_of(cls), RoutedConfig.__dataclass_fields__
    options = {option.name for option in cls.options}
    for field in set(cls.fields) | options:
        assert field in keywords, f"{cls.__name__} declares {field!r}, but its constructor takes {sorted(keywords)}"
    for field in set(cls.fields) - {"scaling"}:
        assert field in config, f"{cls.__name__}: {field!r} is no field of a configuration; make it an Option"
    clash = options & config.keys()
    assert not clash, f"{cls.__name__}: {sorted(clash)} are fields of configurations; name them in `fields`"


@every_part
def test_what_a_part_needs_is_given_by_some_part(axis, name):
    cls = REGISTRIES[axis][name]
    given = frozenset().union(*(part.gives for registry in REGISTRIES.values() for part in registry.values()))
    assert cls.needs <= given, f"nothing that is registered gives {sorted(cls.needs - given)}"
    unknown = cls.context_needs - CONTEXT
    assert not unknown, f"context_needs: {sorted(unknown)} is nothing that TokenContext holds; it has {CONTEXT}"


@every_part
def test_a_part_is_documented(axis, name):
    cls = REGISTRIES[axis][name]
    text = inspect.getmodule(cls).__doc__ or ""
    first = text.strip().splitlines()[0] if text.strip() else ""
    assert first.endswith((".", ":")) or len(first) > 20, f"{cls.__module__}: its first line says what it computes"


@on_layers(PARTS)
def test_tensors_are_those_that_the_part_names(choice):
    torch.manual_seed(0)
    config = config_of(choice, losses=False)
    built = config.build(Place("linear", IN, OUT))
    bank, kind = built.experts, type(built.experts).__name__
    shapes = EXPERTS[choice[3]].shapes(NUM_EXPERTS, RANK)
    own = dict(bank.named_parameters())
    assert own.keys() == shapes.keys(), f"{kind}.shapes names {sorted(shapes)}, the bank has {sorted(own)}"
    for name, begin in shapes.items():
        assert tuple(own[name].shape[: len(begin)]) == begin, f"{kind}.shapes: {name} is {tuple(own[name].shape)}"
    for part in (bank, built.router):
        names = {name for name, _ in part.named_parameters()}
        assert isinstance(part, ModulePart) and set(part.up) <= names and set(part.frozen) <= names
    assert bank.up, f"{kind}.up names the tensors that start at zero and carry the result out, for LoRA+"
    assert all(not own[name].any() for name in bank.up), f"{kind}: {bank.up} start at zero, so that nothing is added"
    assert built.router.learns == any(name not in built.router.frozen for name, _ in built.router.named_parameters())


@on_layers(list({choice[3]: choice for choice in PARTS}.values()))
def test_inner_products_of_experts_are_those_of_the_matrices_that_each_adds(choice):
    bank = layer_of(choice).experts["default"]
    torch.manual_seed(0)
    x_TD, base_TO = torch.randn(2 * (IN + OUT), IN).double(), torch.randn(2 * (IN + OUT), OUT).double()
    known_TF = torch.cat([x_TD, base_TO, torch.ones(len(x_TD), 1).double()], dim=-1)
    maps = []
    for gates_TE in torch.eye(bank.num_choices).double().unsqueeze(1).expand(-1, len(x_TD), -1):
        alone = Routing(weights=gates_TE, experts=None, logits=gates_TE, probs=gates_TE)
        added_TO = bank(x_TD, base_TO, alone) - base_TO
        map_FO = torch.linalg.lstsq(known_TF, added_TO).solution
        maps.append(map_FO if torch.allclose(known_TF @ map_FO, added_TO) else None)
    products = bank.delta_products()
    linear = all(own is not None for own in maps)
    assert linear or not bank.mergeable, f"{type(bank).__name__} is mergeable, but adds no matrix"
    if products is not None and linear:
        flat_EN = torch.stack(maps).flatten(1)
        close(products, flat_EN @ flat_EN.T, f"{type(bank).__name__}.delta_products are of other matrices", 1e-9)


@on_layers(PARTS)
@pytest.mark.parametrize("num_experts", [1, NUM_EXPERTS])
def test_a_promise_to_merge_is_kept_and_nothing_else_merges(choice, num_experts):
    layer, (x_TD, base_TO) = layer_of(choice, num_experts=num_experts), inputs()
    bank, router = layer.experts["default"], layer.router["default"]
    if bank.mergeable:
        weights_E = torch.linspace(0.2, 0.9, bank.num_choices).double()
        rows_TE = weights_E.expand(len(x_TD), -1)
        constant = Routing(weights=rows_TE, experts=None, logits=rows_TE, probs=rows_TE)
        expected = base_TO + x_TD @ bank.delta_weight(weights_E).T
        close(bank(x_TD, base_TO, constant), expected, f"{type(bank).__name__}.delta_weight is no such matrix")
    if router.mergeable:
        gates_TE = decide(layer, x_TD, context()).gate_matrix()
        advice = f"{type(router).__name__} says mergeable, but weighs experts by the token"
        close(gates_TE, gates_TE[:1].expand_as(gates_TE), advice)
    if not (bank.mergeable and router.mergeable):
        before = layer.base_layer.weight.clone()
        with pytest.raises(ValueError, match="merge"):
            layer.merge()
        assert torch.equal(layer.base_layer.weight, before) and not layer.merged


@on_layers(PARTS, PAIRS)
def test_experts_in_another_order_do_the_same_or_are_refused(choice):
    torch.manual_seed(0)
    model = get_peft_model(OneLinear(IN, OUT), config_of(choice, losses=False, target_modules=["linear"]))
    randomize(model)
    layer, known, (x_TD, base_TO) = model.base_model.model.linear, context(), inputs(dtype=torch.float32)
    before = layer.add("default", x_TD, base_TO.clone(), known)
    names, order = [*model.state_dict()], {layer.place: [2, 0, 1]}
    if promised(choice, "separable"):
        with_experts(model, "default", "turned", order)
        advice = "an expert depends on the number of another one: separable=False"
        close(layer.add("turned", x_TD, base_TO.clone(), known), before, advice, 1e-5)
    else:
        with pytest.raises(ValueError, match="cannot be chosen anew"):
            with_experts(model, "default", "turned", order)
        assert [*model.state_dict()] == names and [*model.peft_config] == ["default"]
