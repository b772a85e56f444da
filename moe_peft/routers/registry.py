"""The names of routers' parts, as configurations write them, and the router that a set of names means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..options import option_values
from ..part import Part
from ..registries import Registry
from .activation_abs import ActivationAbs
from .activation_norm import ActivationNorm
from .balanced_assignment import BalancedAssignment
from .bias_balanced import BiasBalanced
from .capacity import Capacity, CapacityRouter
from .centroid import Centroid
from .compete import Compete
from .constant import ConstantRouter
from .cosine import Cosine
from .dense import Dense, DenseRouter
from .domain_embedding import DomainEmbedding
from .entmax import Entmax
from .entropy_top_k import EntropyTopK
from .expert_choice import ExpertChoice
from .expert_prototyping import ExpertPrototyping
from .fixed_random import FixedRandomRouter
from .gates import Gate, Softmax
from .gumbel import Gumbel
from .hybrid import Hybrid
from .layer_logits import LayerLogits
from .linear import LinearRouter
from .low_space import LowSpaceRouter
from .mean_activation import MeanActivation
from .mixture import MixtureRouter
from .null_top_k import NullTopK
from .positive import Positive
from .product_keys import ProductKeys
from .prompt_mean import PromptMean
from .random import RandomRouter
from .relaxed_bernoulli import RelaxedBernoulli
from .relu import Relu
from .router import Router
from .selector import Selector
from .sigmoid import Sigmoid
from .sparsegen import Sparsegen
from .sparsemixer import SparseMixer
from .task_table import TaskTable
from .threshold import Threshold
from .token_hash import TokenHash
from .token_mask import TokenMask
from .token_student import TokenStudent
from .top_k import TopK, TopKRouter
from .top_p import TopP
from .tree import Tree
from .two_layer import TwoLayer

# What a configuration means that names no router, scorer or gate.
DEFAULT_ROUTER, DEFAULT_SCORER, DEFAULT_GATE = "dense", "linear", "softmax"
# z = scorer(x)
SCORERS: dict[str, type[Router]] = Registry(
    "SCORERS",
    Router,
    {
        "linear": LinearRouter,
        "activation_norm": ActivationNorm,
        "activation_abs": ActivationAbs,
        "low_space": LowSpaceRouter,
        "task_table": TaskTable,
        "layer_logits": LayerLogits,
        "centroid": Centroid,
        "cosine": Cosine,
        "fixed_random": FixedRandomRouter,
        "mixture": MixtureRouter,
        "prompt_mean": PromptMean,
        "hybrid": Hybrid,
        "mean_activation": MeanActivation,
        "token_hash": TokenHash,
        "token_mask": TokenMask,
        "tree": Tree,
        "two_layer": TwoLayer,
        "compete": Compete,
        "domain_embedding": DomainEmbedding,
        "product_keys": ProductKeys,
        "token_student": TokenStudent,
    },
)
# p = gate(z)
GATES: dict[str, type[Gate]] = Registry(
    "GATES",
    Gate,
    {
        "softmax": Softmax,
        "sigmoid": Sigmoid,
        "relu": Relu,
        "gumbel": Gumbel,
        "entmax": Entmax,
        "relaxed_bernoulli": RelaxedBernoulli,
    },
)
# routing = selector(z, p); the names that a configuration's `router` takes
SELECTORS: dict[str, type[Selector]] = Registry(
    "SELECTORS",
    Selector,
    {
        "dense": Dense,
        "top_k": TopK,
        "capacity": Capacity,
        "bias_balanced": BiasBalanced,
        "null_top_k": NullTopK,
        "positive": Positive,
        "top_p": TopP,
        "entropy_top_k": EntropyTopK,
        "threshold": Threshold,
        "sparsegen": Sparsegen,
        "expert_choice": ExpertChoice,
        "sparsemixer": SparseMixer,
        "expert_prototyping": ExpertPrototyping,
        "balanced_assignment": BalancedAssignment,
    },
)
# Whole routers; those with the name of a selector are its router with linear scores and a softmax.
ROUTERS: dict[str, type[Router]] = Registry(
    "ROUTERS",
    Router,
    {
        "dense": DenseRouter,
        "top_k": TopKRouter,
        "capacity": CapacityRouter,
        "constant": ConstantRouter,
        "random": RandomRouter,
    },
)


def router_names() -> tuple[str, ...]:
    """Every name that a configuration's `router` takes."""
    return tuple(dict.fromkeys((*ROUTERS, *SELECTORS)))


def router_parts(router: str, scorer: str = DEFAULT_SCORER, gate: str = DEFAULT_GATE) -> tuple[type[Part], ...]:
    """The classes that a set of names means: scorer, gate and selector, or the one of a whole router."""
    if router in SELECTORS:
        return SCORERS[scorer], GATES[gate], SELECTORS[router]
    return (ROUTERS[router],)


def router_fields(router: str, scorer: str = DEFAULT_SCORER, gate: str = DEFAULT_GATE) -> frozenset[str]:
    """Names of the configuration's fields that a router takes."""
    return frozenset(name for part in router_parts(router, scorer, gate) for name in part.fields)


def router_gives(router: str, scorer: str = DEFAULT_SCORER, gate: str = DEFAULT_GATE) -> frozenset[str]:
    """What a router's decision holds for losses and experts, in the words of `Part.gives`."""
    return frozenset().union(*(part.gives for part in router_parts(router, scorer, gate)))


def router_needs(router: str, scorer: str = DEFAULT_SCORER, gate: str = DEFAULT_GATE) -> frozenset[str]:
    """What a router asks of the experts, in the words of `Part.gives`: all that its own parts do not give."""
    needs = frozenset[str]().union(*(part.needs for part in router_parts(router, scorer, gate)))
    return needs - router_gives(router, scorer, gate)


def router_learns(router: str, scorer: str = DEFAULT_SCORER, gate: str = DEFAULT_GATE) -> bool:
    """Whether training changes its scores: by parameters of its own, or by those of the experts that it reads."""
    scorers = [part for part in router_parts(router, scorer, gate) if issubclass(part, Router)]
    return any(part.learns or part.reads == "activations" for part in scorers)


def lets_nothing_pass(scorer: type[Router] | Router, gate: type[Gate] | Gate) -> bool:
    """Whether no score of a router ever passes its gate, so that no expert would be used or learn.

    Args:
        scorer: The router, or its class.
        gate: The gate, or its class.
    """
    return scorer.log_scores and gate.needs_positive


def make_router(
    in_features: int,
    num_experts: int,
    *,
    router: str,
    scorer: str = DEFAULT_SCORER,
    gate: str = DEFAULT_GATE,
    init_std: float | None = None,
    values: Mapping[str, Any] | None = None,
    args: Mapping[str, Any] | None = None,
) -> Router:
    """Make a router by the names of its parts.

    Args:
        in_features: D, width of what it reads.
        num_experts: E.
        router: Name of the selector, or of a whole router.
        scorer: Name of the scorer; without meaning for a whole router.
        gate: Name of the gate; without meaning for a whole router.
        init_std: Standard deviation of the initialisation; None takes the scorer's own.
        values: The configuration's fields by name; the parts take those that they declare.
        args: Options by name; the parts take their own, and defaults elsewhere.

    Raises:
        ValueError: Scorer and selector have tensors of one name.
    """

    def settings(part: type[Part]) -> dict[str, Any]:
        given = {name: (values or {})[name] for name in part.fields if name in (values or {})}
        return {**given, **option_values(part, args)}

    if router not in SELECTORS:
        whole = ROUTERS[router]
        made = whole(in_features, num_experts, init_std=init_std, **settings(whole))
        made.check_names()
        return made
    selector_cls, gate_cls, scorer_cls = SELECTORS[router], GATES[gate], SCORERS[scorer]
    made = scorer_cls(
        in_features,
        num_experts,
        select=selector_cls(**settings(selector_cls)),
        gate=gate_cls(**settings(gate_cls)),
        init_std=init_std,
        **settings(scorer_cls),
    )
    made.check_names()
    return made
