"""Parts that a method builds itself are refused before anything changes, where they cannot stand together or serve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from peft import get_peft_model

from moe_peft import RoutedConfig, describe
from moe_peft.config.fitting_parts import check_fit
from moe_peft.extend import (
    GATES,
    Dense,
    Experts,
    LinearRouter,
    LowRankExperts,
    RoutedParts,
    RouterLoss,
    RouterObjective,
    TopK,
)
from tests.tiny import OneLinear


class Spread(RouterLoss):
    needs = frozenset({"selection", "spread"})


class ByActivations(LinearRouter):
    needs = frozenset({"activations"})
    reads = "activations"


class Logarithmic(LinearRouter):
    log_scores = True

    def scores(self, x, context):
        return super().scores(x, context).log_softmax(-1)


class Gives(TopK):
    gives = TopK.gives | {"spread"}


class Bare(Experts):
    """Has no activations to show."""


class Looking(LowRankExperts):
    causal = False


class Forgetting(LowRankExperts):
    decode_stateless = False


class Mixing(Dense):
    batch_invariant = False


def bank(kind=LowRankExperts):
    return kind() if kind is Bare else kind(7, 5, num_experts=3, r=2, scaling=1.0)


def parts(router=None, experts=LowRankExperts, loss=False):
    objective = RouterObjective({"spread": (Spread(), 0.1)}) if loss else None
    return RoutedParts(experts=bank(experts), router=router, objective=objective)


@dataclass
class OwnConfig(RoutedConfig):
    """Builds what the test asks for, whatever it is called."""

    made: ClassVar[RoutedParts]

    def build(self, place):
        return type(self).made


CAUSAL = "which a causal language model does not have when it writes"
CASES = {
    "loss": (
        lambda: parts(LinearRouter(7, 3, select=TopK(top_k=1)), loss=True),
        r"OwnConfig: the loss 'spread' needs spread .*none of LinearRouter \(Softmax, TopK\), LowRankExperts gives",
    ),
    "scorer": (
        lambda: parts(ByActivations(7, 3, select=Dense()), Bare),
        r"OwnConfig: ByActivations \(Softmax, Dense\) needs activations",
    ),
    "gate": (
        lambda: parts(Logarithmic(7, 3, select=Dense(), gate=GATES["relu"]())),
        r"OwnConfig: Logarithmic \(Relu, Dense\) scores by logarithms .* no expert would ever be used",
    ),
    "later tokens": (lambda: parts(LinearRouter(7, 3, select=Dense()), Looking), f"Looking a later token .*{CAUSAL}"),
    "decoding": (
        lambda: parts(LinearRouter(7, 3, select=Dense()), Forgetting),
        r"OwnConfig: Forgetting says that decoding token by token differs .* asks for no number of cached tokens",
    ),
    "other rows": (lambda: parts(LinearRouter(7, 3, select=Mixing())), rf"Mixing\) other rows .*{CAUSAL}"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_lacks_its_like_or_looks_ahead_is_refused_with_the_model_as_it_was(case):
    make, message = CASES[case]
    model = OneLinear(7, 5)
    with torch.device("meta"):
        OwnConfig.made = make()
    config = OwnConfig(task_type="CAUSAL_LM", target_modules=["linear"])
    for attempt in (get_peft_model, describe):
        with pytest.raises(ValueError, match=message):
            attempt(model, config)
    assert type(model.linear) is torch.nn.Linear and not hasattr(model, "peft_config")


@pytest.mark.parametrize(
    ("fields", "make"),
    [
        ({}, lambda: parts(LinearRouter(7, 3, select=Gives(top_k=1)), loss=True)),
        ({}, lambda: parts(ByActivations(7, 3, select=Dense()))),
        ({"task_type": "CAUSAL_LM"}, lambda: parts(LinearRouter(7, 3, select=Dense()))),
        ({}, lambda: parts(LinearRouter(7, 3, select=Mixing()))),
        (
            {"task_type": "CAUSAL_LM", "allow_non_causal": True},
            lambda: parts(LinearRouter(7, 3, select=Mixing()), Looking),
        ),
    ],
)
def test_what_has_all_that_it_needs_is_taken(fields, make):
    check_fit(RoutedConfig(target_modules=["linear"], **fields), make())
