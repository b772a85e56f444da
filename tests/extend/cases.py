"""What the laws of registered parts run on: layers with everything that a part may want to know, and tiny models."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache

import pytest
import torch
from peft import get_peft_model
from torch import nn

import moe_peft
from moe_peft import RoutedConfig, routed_layers
from moe_peft.extend import EXPERTS, RoutedLayer, TokenContext
from moe_peft.part import Part
from moe_peft.routers import router_parts
from tests.contract.cases import MODELS, randomize
from tests.tiny import OneLinear

from . import registered
from .combinations import Choice, covering, losses_for, placed

NUM_EXPERTS, RANK, IN, OUT = 3, 2, 7, 5
LENGTHS = (4, 2, 3)  # valid tokens of the rows of a context
GROUPS = torch.tensor([0, 1, 0])
NUM_LAWS = 7  # laws of whole models
EVERY = 4  # one pair of parts in so many meets a law of layers in `make test`
PLACES = {"llama": {"target_modules": ["q_proj", "down_proj"]}, "olmoe": {"wraps": "block"}}
# Kinds of experts that stand beside linear layers alone.
OF_LINEAR = {name for name, kind in EXPERTS.items() if kind.reads_weight}
# Kind of place that some experts ask for -> the model that has it, and the fields that name it.
PLACED = {"ffn": ("llama", {"wraps": "block"})}


def name_of(choice: Choice) -> str:
    return "-".join(choice)


def on_layers(first: list[Choice], rest: Sequence[Choice] = ()):
    """A test on one layer for each choice: the first in `make test`, the rest in `make slow`."""
    params = [pytest.param(choice, id=name_of(choice)) for choice in first]
    others = [choice for choice in rest if choice not in first]
    params += [pytest.param(choice, id=name_of(choice), marks=pytest.mark.slow) for choice in others]
    return pytest.mark.parametrize("choice", params)


def on_pairs(turn: int, rest: Sequence[Choice] = ()):
    """A test on one layer for every part and one pair in `EVERY` in `make test`, for every pair in `make slow`.

    Args:
        turn: Number of the law; pairs that one law leaves out the next ones see.
        rest: Further choices for `make slow`.
    """
    kept = dict.fromkeys([*PARTS, *PAIRS[turn % EVERY :: EVERY]])
    return on_layers(list(kept), [*PAIRS, *rest])


def on_models(turn: int):
    """A test on whole models: every part on one place in `make test`, every pair on every place in `make slow`.

    Triples of parts are dealt out to the laws and places, so that each meets on a whole model once in `make slow`.

    Args:
        turn: Number of the law; a part that one law sees on a linear layer the next one sees on a block.
    """
    params = []
    seen = {*PARTS, *PAIRS}
    for number, choice in enumerate(choice for choice in TRIPLES if choice not in seen):
        if number % NUM_LAWS == turn:
            places = places_of(choice)
            place = places[(number // NUM_LAWS) % len(places)]
            params.append(pytest.param(place, choice, marks=pytest.mark.slow, id=f"{place}-{name_of(choice)}"))
    for choice in placed():
        params.append(pytest.param(PLACED[EXPERTS[choice[3]].placement][0], choice, id=name_of(choice)))
    for number, choice in enumerate(dict.fromkeys([*PARTS, *PAIRS])):
        places = places_of(choice)
        for where, place in enumerate(places):
            kept = choice in PARTS and (number + turn + where) % len(places) == 0
            marks = [] if kept else [pytest.mark.slow]
            params.append(pytest.param(place, choice, marks=marks, id=f"{place}-{name_of(choice)}"))
    return pytest.mark.parametrize(("place", "choice"), params)


def places_of(choice: Choice) -> list[str]:
    """The tiny models on which the experts of a choice can stand."""
    return [place for place in PLACES if place == "llama" or choice[3] not in OF_LINEAR]


def classes_of(choice: Choice) -> list[type[Part]]:
    router, scorer, gate, experts = choice
    return [*router_parts(router, scorer, gate), EXPERTS[experts]]


def context_needs(choice: Choice) -> frozenset[str]:
    """What the parts must know of the tokens."""
    return frozenset().union(*(part.context_needs for part in classes_of(choice)))


def promised(choice: Choice, *names: str) -> bool:
    """Whether all parts of a choice make all of these promises."""
    return all(getattr(part, name) for part in classes_of(choice) for name in names)


with registered():
    PARTS, PAIRS, TRIPLES = (covering(strength) for strength in (1, 2, 3))
    NEEDING = [choice for choice in PAIRS if context_needs(choice)]
    LEARNING = [choice for choice in dict.fromkeys([*PARTS, *PAIRS]) if losses_for(choice)]


def config_of(choice: Choice, *, losses: bool = True, **fields) -> RoutedConfig:
    """A configuration with all losses that fit."""
    router, scorer, gate, experts = choice
    weights = dict.fromkeys(losses_for(choice), 0.1) if losses else {}
    names = {"router": router, "scorer": scorer, "gate": gate, "experts": experts, "losses": weights or None}
    free = {"allow_non_causal": not promised(choice, "causal")}
    return RoutedConfig(
        **{**free, "num_experts": NUM_EXPERTS, "r": RANK, "router_aux_loss_coef": 0.0, **names, **fields}
    )


@cache
def _layer(choice: Choice, num_experts: int) -> RoutedLayer:
    torch.manual_seed(0)
    config = config_of(choice, losses=False, target_modules=["linear"], num_experts=num_experts)
    model = get_peft_model(OneLinear(IN, OUT), config)
    randomize(model)
    (layer,) = routed_layers(model.double())
    return layer


def layer_of(choice: Choice, num_experts: int = NUM_EXPERTS) -> RoutedLayer:
    """A float64 layer without router losses, whose training passes need no model around them."""
    return copy.deepcopy(_layer(choice, num_experts))


def context(training: bool = False, **fields) -> TokenContext:
    """Three rows with padding at their ends, and all that a part may ask for."""
    width = max(LENGTHS)
    positions = torch.arange(width).expand(len(LENGTHS), width)
    valid_T = (positions < torch.tensor(LENGTHS)[:, None]).reshape(-1)
    known = {
        "valid": valid_T,
        "sequences": torch.arange(len(LENGTHS)).repeat_interleave(width),
        "num_sequences": len(LENGTHS),
        "groups": GROUPS,
        "token_ids": 3 + (5 * torch.arange(len(valid_T))) % 50,
        "prompt": (positions < 2).reshape(-1),
        "num_rows": len(LENGTHS),
    }
    return TokenContext(training=training, **{**known, **fields})


def token(known: TokenContext, t: int) -> TokenContext:
    """What is known of one token alone, as in decoding."""
    one = slice(t, t + 1)
    return TokenContext(
        training=known.training,
        valid=known.valid[one],
        sequences=torch.zeros(1, dtype=torch.long),
        groups=known.groups[known.sequences[one]],
        token_ids=known.token_ids[one],
        prompt=known.prompt[one],
    )


def inputs(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """x (T, D) and the base output (T, O) of the tokens of `context`."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = len(LENGTHS) * max(LENGTHS)
    x_TD, out_TO = (torch.randn(num_tokens, width, generator=generator).double() for width in (IN, OUT))
    return x_TD.to(dtype), out_TO.to(dtype)


def decide(layer: RoutedLayer, x_TD: torch.Tensor, known: TokenContext):
    """What a layer's router decides, called on what it reads."""
    router, bank = layer.router["default"], layer.experts["default"]
    read = bank.activations(bank.prepare(x_TD, known)) if router.reads == "activations" else x_TD
    return router(read, known)


def parts_of(model: nn.Module) -> list[nn.Module]:
    """The modules of an adapter's parts."""
    layers = [model] if isinstance(model, RoutedLayer) else routed_layers(model)
    return [part for layer in layers for part in (*layer.experts.values(), *layer.router.values())]


def make(place: str, choice: Choice, *, train=False, dtype=torch.float64, random=True, losses=True, **fields):
    """An adapted tiny model."""
    torch.manual_seed(0)
    kind = EXPERTS[choice[3]].placement
    where = PLACES[place] if kind is None else PLACED[kind][1]
    config = config_of(choice, losses=losses, **{"task_type": "CAUSAL_LM", **where, **fields})
    model = get_peft_model(MODELS[place].build(), config).to(dtype)
    if random:
        randomize(model)
    return model.train(train)


def batch_for(place: str, choice: Choice, *, labels: bool = False) -> dict[str, torch.Tensor]:
    """A batch with what the parts must know; with labels where they want the prompt."""
    batch, needs = MODELS[place].batch(), context_needs(choice)
    if "prompt" in needs:
        batch["labels"][:, :3] = -100
    groups = {"task_type": GROUPS} if "groups" in needs else {}
    return {key: value for key, value in batch.items() if key != "labels" or labels or "prompt" in needs} | groups


def rows_of(batch: dict[str, torch.Tensor], *rows: int) -> dict[str, torch.Tensor]:
    return {key: value[list(rows)] for key, value in batch.items()}


def with_groups(model: nn.Module, choice: Choice, *rows: int):
    """For calls that cannot bring a column of groups."""
    needed = "groups" in context_needs(choice)
    return moe_peft.groups(model, task_type=GROUPS[list(rows)].tolist()) if needed else nullcontext()


def close(found: torch.Tensor, expected: torch.Tensor, advice: str, atol: float = 1e-10) -> None:
    """Equal to rounding; the message says what to look at in the part."""
    torch.testing.assert_close(found, expected, rtol=atol, atol=atol, msg=lambda text: f"{advice}\n{text}")
