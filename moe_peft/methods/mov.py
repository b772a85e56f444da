"""MoV, mixture of vectors: (IA)3 vectors of which a softmax mixes several for each token, or for each of its heads.

    p = softmax(Wg u)
    u' = u * (1 + sum_e p_e (l_e - 1))         for u the keys, the values, and the intermediate of the FFN

Zadouri et al., 2023, arXiv 2309.05444. The weights sum to one, so this is the paper's u * sum_e p_e l_e; with `top_k`,
of which the paper's code keeps weights that sum to less, the residual form still starts as the identity. Keys and
values are scaled before rotary embeddings, as (IA)3 does in peft; the FFN's intermediate is the input of its last
layer, where the authors scale the activated branch alone before the product with the other, and route by it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from ..config.absent import TARGET_PARAMETERS, Absent, absent, accepts_absent
from ..config.fields import MixtureConfig, PlacingConfig, RouterLossConfig
from ..config.meaning import NOT_MEANING
from ..config.pair_fields import LowRankConfig, PairConfig
from ..config.parts import RoutedParts
from ..config.patterns import NAMES_OR_PATTERN
from ..config.router_fields import CapacityConfig, TopKConfig
from ..experts import VectorExperts
from ..forward.objective import Loss, RouterObjective
from ..losses import importance, z_loss
from ..place import MoeLayer, Place
from ..places.key_value_ffn import ffn_output_names, head_widths, key_value_names
from ..places.linear import linear_names, shortest_endings, text_linear_names
from ..tuner.registration import extend_peft_type, register
from ..tuner.tuner import RoutedTuner
from .build import build_router

PEFT_TYPE = extend_peft_type("MOV")
NO_MATRICES = "vectors have no rank and no scale"
INIT_STD = 0.02
# What files written before hold of a field without meaning here.
IMPLEMENTATION = {"experts_implementation": "dense"}


@accepts_absent
@dataclass
class MovConfig(RouterLossConfig, TopKConfig, PlacingConfig):
    """Configuration of MoV; defaults are the paper's MoV-10."""

    method: ClassVar[str] = "MoV"
    equation: ClassVar[str] = "u' = u * (1 + sum_e softmax(Wg u)_e (l_e - 1))"
    source: ClassVar[str] = "arXiv 2309.05444"
    adapter_type: ClassVar[str] = "MOV"
    absent_fields: ClassVar[Absent] = {
        **TARGET_PARAMETERS,
        **{name: own for name, own in absent(PairConfig, NO_MATRICES).items() if name != "init_weights"},
        **absent(LowRankConfig, NO_MATRICES, **IMPLEMENTATION),
        **absent(MixtureConfig, NO_MATRICES),
        **absent(CapacityConfig, "MoV's routers have no capacity"),
    }

    init_weights: bool | str = field(
        default=True,
        metadata={
            "help": "True: vectors of ones, the identity. False: normal around one, so it is not (for tests).",
            **NOT_MEANING,
        },
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names (or a regex) of the linear layers to scale, or 'all-linear' for every linear layer that is "
            "neither a router nor the output head. None picks keys, values and the last layers of FFNs; projections "
            "that hold queries, keys and values in one matrix are then scaled as a whole.",
            **NAMES_OR_PATTERN,
            **NOT_MEANING,
        },
    )
    num_experts: int = field(default=10, metadata={"help": "Vectors at each place (paper: 10, 30 or 60)."})
    feedforward_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Which targets are scaled at their input, names or a regex; None: the last layers of FFNs.",
            **NAMES_OR_PATTERN,
        },
    )
    router_input: str = field(
        default="activation",
        metadata={"help": "What the router reads: 'activation' (what is scaled) or 'hidden' (the layer's input)."},
    )
    router_granularity: str = field(
        default="head",
        metadata={
            "help": "'head': keys and values are routed head by head, with one router for all heads, where they have "
            "a projection of their own, the width of a head is known, and the router reads the activation. 'token': "
            "all heads together."
        },
    )
    head_dim: int | None = field(
        default=None, metadata={"help": "Width of a key or value head; None asks the model's attention modules."}
    )

    def __post_init__(self) -> None:
        # What a model says of itself; see resolve.
        self._head_widths: dict[str, int] = {}
        self._sparse_layers = 0
        super().__post_init__()
        self.peft_type = PEFT_TYPE

    def _fill_in(self) -> None:
        if self.top_k is not None and self.router == "dense":
            self.router = "top_k"

    def _make_sets(self, *names: str) -> None:
        super()._make_sets("feedforward_modules", *names)

    @property
    def default_learning_rate(self) -> float:
        """See `MoeConfig.default_learning_rate`: vectors move little at LoRA's. IA3's (arXiv 2205.05638)."""
        return 3e-3

    @property
    def placement(self) -> str:
        """See `MoeConfig.placement`."""
        return "scaled"

    def validate(self) -> None:
        """Check every field; see `MoeConfig.validate`."""
        self._check_choice("router", ("dense", "top_k"))
        super().validate()
        self._check_choice("init_weights", (True, False))
        self._check_choice("router_input", ("activation", "hidden"))
        self._check_choice("router_granularity", ("head", "token"))
        hint = "a positive number or None, at most 65536"
        self._check(self.head_dim is None or 1 <= self.head_dim <= 65536, "head_dim", hint)

    def resolve(self, model: nn.Module, layers: Sequence[MoeLayer]) -> None:
        """Choose the places, and take the widths of heads from a model; see `MoeConfig.resolve`.

        Raises:
            ValueError: There are no keys and values to choose, `feedforward_modules` names nothing, or `head_dim` does
                not divide a width.
        """
        linears, others = linear_names(model), set(dict(model.named_modules()))
        self._sparse_layers = len(layers)
        self._head_widths = head_widths(model, self.head_dim)
        outputs = ffn_output_names(model)
        if self.target_modules is None:
            text = set(text_linear_names(model))
            names = [*key_value_names(model), *(name for name in outputs if name in text)]
            self.target_modules = set(shortest_endings(names, others - set(names)))  # type: ignore[assignment]
        if self.feedforward_modules is None:
            self.feedforward_modules = set(shortest_endings(outputs, others - set(outputs)))  # type: ignore[assignment]
        self._check(
            not self.feedforward_modules or any(self.scales_input(name) for name in linears),
            "feedforward_modules",
            f"None, or names of linear layers, which are called {sorted({n.rpartition('.')[2] for n in linears})}",
        )

    def expected_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `MoeConfig.expected_shapes`."""
        shapes = VectorExperts.shapes(self.num_experts, 0) if self.per_layer is None else {}
        return {f".{name}": begins for name, begins in shapes.items()}

    def card_fields(self) -> list[str]:
        """See `MoeConfig.card_fields`."""
        return ["router_input", "router_granularity", *super().card_fields()]

    def summary(self) -> str:
        """See `MoeConfig.summary`; says what fused experts keep out of reach."""
        top = "" if self.top_k is None else f", top {self.top_k}"
        sparse = f", not inside the experts of {self._sparse_layers} layers" if self._sparse_layers else ""
        return f"{self.num_experts} vectors, router {self.router} on the {self.router_input}{top}{sparse}"

    def scales_input(self, name: str) -> bool:
        """Whether a place is scaled at its input."""
        modules = self.feedforward_modules or []
        if isinstance(modules, str):
            return re.fullmatch(modules, name) is not None
        return any(name == module or name.endswith(f".{module}") for module in modules)

    def build(self, place: Place) -> RoutedParts:
        """Build the parts of one layer; see `MoeConfig.build`."""
        at_input, hidden = self.scales_input(place.name), self.router_input == "hidden"
        width = place.in_features if at_input else place.out_features
        by_head = self.router_granularity == "head" and not at_input and not hidden
        heads = width // self._head_widths.get(place.name, width) if by_head else 1
        vectors = VectorExperts(
            place.in_features,
            width,
            num_experts=self.num_experts,
            num_heads=heads,
            scales_input=at_input,
            router_reads_hidden=hidden,
            init_weights=self.init_weights,
        )
        read = place.in_features if hidden else width // heads
        router = build_router(self, read, self.num_experts, init_std=INIT_STD)
        losses: dict[str, tuple[Loss, float]] = {
            "importance": (importance, self.router_aux_loss_coef),
            "z_loss": (z_loss, self.router_z_loss_coef),
        }
        return RoutedParts(
            experts=vectors, router=router, objective=RouterObjective(losses, scope=self.load_balancing_scope)
        )


class MovModel(RoutedTuner):
    """Tuner of MoV adapters."""

    prefix: str = "mov_"


register(MovConfig, MovModel)
