"""Groups of fields that adapter types share; a configuration is composed from those that mean something for it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..experts import Experts, LowRankExperts
from ..forward.joined_losses import SCOPES
from ..messages import warn
from ..ops import AUTO, IMPLEMENTATIONS
from ..routers import DEFAULT_GATE, DEFAULT_SCORER, router_fields, router_names, router_parts
from ..types import Place
from .config import BACKBONE, MoeConfig
from .layer_sizes import SIZES, sizes_at, with_sizes, wrong_sizes
from .meaning import NOT_MEANING
from .patterns import LISTS_IN_NAMES, NAMES_OR_PATTERN

# Sizes beyond these are slips of the pen.
MAX_RANK, MAX_EXPERTS = 2**16, 2**20
# Factors outside of these leave the range of float32, if not at once then in an optimizer's squares.
SMALLEST, LARGEST = 1e-30, 1e6
IN_RANGE = f"from {SMALLEST:g} to {LARGEST:g}"


@dataclass
class PlacingConfig(MoeConfig):
    """Fields that choose among the modules of a model by their names and layers."""

    exclude_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names (or a regex) of modules to leave out.", **NAMES_OR_PATTERN, **NOT_MEANING},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the decoder layers to adapt; None adapts all.", **NOT_MEANING}
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Name of the module list that layers_to_transform counts in.",
            **LISTS_IN_NAMES,
            **NOT_MEANING,
        },
    )

    def _make_sets(self, *names: str) -> None:
        super()._make_sets("exclude_modules", *names)

    @property
    def layer_selection(self) -> tuple[list[int] | int | None, list[str] | str | None]:
        """See `MoeConfig.layer_selection`."""
        return self.layers_to_transform, self.layers_pattern


@dataclass
class PairConfig(MoeConfig):
    """Fields of pairs of low-rank matrices."""

    init_choices: ClassVar[tuple[bool | str, ...]] = (True, False, "gaussian")

    r: int = field(default=4, metadata={"help": "Rank of one expert."})
    lora_alpha: float = field(
        default=8, metadata={"help": "Scale of the experts: the routed sum is times lora_alpha / r."}
    )
    lora_dropout: float = field(
        default=0.0,
        metadata={"help": "Probability of dropping an element of the experts' input in training.", **NOT_MEANING},
    )
    use_rslora: bool = field(
        default=False, metadata={"help": "Scale by lora_alpha / sqrt(r) instead of lora_alpha / r."}
    )
    init_weights: bool | str = field(
        default=True,
        metadata={
            "help": "True: A uniform as in nn.Linear, B zero. 'gaussian': A normal with standard deviation 0.02, B "
            "zero. False: both random, so the adapter is not the identity at the start (for tests).",
            **NOT_MEANING,
        },
    )

    @property
    def scaling(self) -> float:
        """s, the factor of the routed sum of experts."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def validate(self) -> None:
        """Check every field; see `MoeConfig.validate`."""
        super().validate()
        self._check(1 <= self.r <= MAX_RANK, "r", f"a rank of at least 1 and at most {MAX_RANK}")
        self._check(self.lora_alpha > 0, "lora_alpha", "a positive number")
        hint = f"a positive number with a factor lora_alpha / r {IN_RANGE}, which for r={self.r} it has not"
        self._check(SMALLEST <= self.scaling <= LARGEST, "lora_alpha", hint)
        self._check(0 <= self.lora_dropout < 1, "lora_dropout", "a number from 0 up to, but not including, 1")
        self._check_choice("init_weights", self.init_choices)


@dataclass
class LowRankConfig(PairConfig):
    """Fields of experts that are pairs of matrices, added to what a frozen module gives.

    Attributes:
        experts_args: Options of the expert kind by name.
    """

    experts_args: ClassVar[dict[str, Any] | None] = None

    experts_implementation: str = field(
        default=AUTO,
        metadata={
            "help": "How the routed sum is computed: 'dense' (two GEMMs over all experts), 'grouped' or 'segment' "
            "(slots sorted by expert), 'gather' (few slots), 'eager' (a loop), or 'auto', which chooses by the sizes.",
            **NOT_MEANING,
        },
    )

    def validate(self) -> None:
        """Check every field; see `MoeConfig.validate`."""
        super().validate()
        self._check_choice("experts_implementation", (AUTO, *IMPLEMENTATIONS))


@dataclass
class RouterConfig(MoeConfig):
    """Fields of a router that scores the experts of the adapter.

    Attributes:
        scorer: Name of what scores the experts, see `routers.SCORERS`.
        gate: Name of the gate function of the scores, see `routers.GATES`.
        router_args: Options of the router's parts by name.
    """

    scorer: ClassVar[str] = DEFAULT_SCORER
    gate: ClassVar[str] = DEFAULT_GATE
    router_args: ClassVar[dict[str, Any] | None] = None

    num_experts: int = field(default=8, metadata={"help": "Experts at each adapted layer."})
    router: str = field(default="dense", metadata={"help": "Name of the router: dense, top_k or capacity."})
    router_jitter_noise: float = field(
        default=0.0,
        metadata={"help": "Half-width of multiplicative noise on the router's input in training.", **NOT_MEANING},
    )
    expert_dropout: float = field(
        default=0.0,
        metadata={
            "help": "Probability of dropping an expert's gate in training; survivors are divided by 1-p.",
            **NOT_MEANING,
        },
    )
    per_layer: dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "help": "Sizes that differ between layers (MoLA, arXiv 2402.08562): {'num_experts': [2, 4, 6, 8]} "
            "gives the first quarter of the layers 2 experts, and so on. Sizes are num_experts, top_k and r; a place "
            "outside of numbered layers keeps the plain fields."
        },
    )

    def validate(self) -> None:
        """Check every field; see `MoeConfig.validate`."""
        super().validate()
        hint = f"at least 1 and at most {MAX_EXPERTS}"
        self._check(self.num_experts is None or 1 <= self.num_experts <= MAX_EXPERTS, "num_experts", hint)
        for name in ("expert_dropout", "router_jitter_noise"):
            self._check(0 <= getattr(self, name) < 1, name, "a number from 0 up to, but not including, 1")
        known = router_names()
        self._check_choice("router", (*known, BACKBONE))
        self._check(
            self.router != BACKBONE or self.placement in ("experts", "slices"),
            "router",
            f"one of {', '.join(map(repr, known))}: only adapters around the backbone's experts follow its routing",
        )
        for name in sorted(self._idle_fields()):
            self._check_left_alone(name, f"the {self.router!r} router does not use it", of=RoutedMoeConfig)
        if self.per_layer is not None:
            own = {entry.name for entry in dataclasses.fields(self)} - self._idle_fields()
            sizes = [name for name in SIZES if name in own and (name == "r" or self.router != BACKBONE)]
            reason = wrong_sizes(self, sizes)
            self._check(reason is None, "per_layer", reason or "")

    def at(self, place: Place) -> RouterConfig:
        """See `MoeConfig.at` and `layer_sizes`."""
        return self if self.per_layer is None else with_sizes(self, sizes_at(self.per_layer, place))

    def router_summary(self) -> str:
        """The router in a few words."""
        return f"router {self.router}"

    def router_fields(self) -> tuple[str, ...]:
        """Names of this configuration's fields that the chosen router takes."""
        own = {entry.name for entry in dataclasses.fields(self)}
        taken = () if self.router == BACKBONE else router_fields(self.router, self.scorer, self.gate)
        return tuple(name for name in taken if name in own)

    def _idle_fields(self) -> set[str]:
        """Names of this configuration's fields that other routers take, and the chosen one does not."""
        own = {entry.name for entry in dataclasses.fields(self)}
        return own & {name for router in router_names() for name in router_fields(router)} - set(self.router_fields())


@dataclass
class TopKConfig(RouterConfig):
    """Fields of a router that keeps some experts of each token."""

    top_k: int | None = field(default=None, metadata={"help": "Experts a token uses; None uses all."})
    norm_topk_prob: bool = field(
        default=False, metadata={"help": "Rescale the weights of the kept experts to sum to one."}
    )

    def validate(self) -> None:
        """Check every field; see `MoeConfig.validate`."""
        super().validate()
        if self.top_k is not None:
            hint = f"between 1 and num_experts={self.num_experts}"
            self._check(1 <= self.top_k <= self.num_experts, "top_k", hint)
        needed = "top_k" in self.router_fields()
        self._check(not needed or self.top_k is not None, "top_k", f"set for the {self.router!r} router")

    def advise(self) -> None:
        """See `MoeConfig.advise`."""
        super().advise()
        if self.norm_topk_prob and self.top_k == 1 and self.num_experts > 1:
            warn(
                f"{type(self).__name__}: with top_k=1, norm_topk_prob=True makes every weight one, whatever the "
                "router says, so that it gets no gradient from the task. Write norm_topk_prob=False, or top_k=2."
            )

    def router_summary(self) -> str:
        """See `RouterConfig.router_summary`."""
        text = super().router_summary()
        return text if self.top_k is None else f"{text}, top {self.top_k}"


@dataclass
class CapacityConfig(TopKConfig):
    """Fields of a router whose experts take a limited number of tokens in training."""

    capacity_factor: float | None = field(
        default=None,
        metadata={
            "help": "Places of an expert over its even share of a sequence's requests, in training; None: no limit."
        },
    )
    capacity_order: str = field(
        default="position",
        metadata={
            "help": "Who is served first: 'position' (tokens in order) or 'choice' (first choices first; not causal)."
        },
    )
    allow_non_causal: bool = field(
        default=False,
        metadata={"help": "Permit parts with which a later token changes an earlier one's output.", **NOT_MEANING},
    )

    def validate(self) -> None:
        """Check every field; see `MoeConfig.validate`."""
        super().validate()
        hint = f"a positive number or None, at most {LARGEST:g}"
        self._check(self.capacity_factor is None or 0 < self.capacity_factor <= LARGEST, "capacity_factor", hint)
        self._check_choice("capacity_order", ("position", "choice"))
        if self.capacity_order == "choice" and self.task_type == "CAUSAL_LM":
            self._check(
                self.allow_non_causal,
                "capacity_order",
                "'position' for a causal language model: with 'choice' a later token takes an earlier token's place. "
                "To train with it all the same, set allow_non_causal=True",
            )


@dataclass
class RouterLossConfig(MoeConfig):
    """Fields of the losses that a router's decisions cost."""

    router_aux_loss_coef: float = field(
        default=0.0, metadata={"help": "Weight of the balance loss, per layer.", **NOT_MEANING}
    )
    router_z_loss_coef: float = field(
        default=0.0, metadata={"help": "Weight of the router z-loss, per layer.", **NOT_MEANING}
    )
    load_balancing_scope: str = field(
        default="global_batch",
        metadata={
            "help": "What the router losses are measured on: 'micro_batch' (the batch of one process), 'global_batch' "
            "(of all processes), or 'accumulation_window' (and the micro-batches before it, in a trainer).",
            **NOT_MEANING,
        },
    )

    def validate(self) -> None:
        """Check every field; see `MoeConfig.validate`."""
        super().validate()
        for name in ("router_aux_loss_coef", "router_z_loss_coef"):
            self._check(is_coefficient(getattr(self, name)), name, f"zero or a positive number {IN_RANGE}")
        self._check_choice("load_balancing_scope", SCOPES)


@dataclass
class MixtureConfig(RouterLossConfig, RouterConfig, LowRankConfig, PlacingConfig):
    """Fields of a routed sum of low-rank experts."""

    routed_scaling_factor: float = field(default=1.0, metadata={"help": "Factor of all combine weights."})

    def validate(self) -> None:
        """Check every field; see `MoeConfig.validate`."""
        super().validate()
        self._check(self.routed_scaling_factor > 0, "routed_scaling_factor", "a positive number")
        product = self.routed_scaling_factor * self.scaling
        hint = f"a positive number whose product with lora_alpha / r = {self.scaling:g} is {IN_RANGE}"
        self._check(SMALLEST <= product <= LARGEST, "routed_scaling_factor", hint)

    def expected_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `MoeConfig.expected_shapes`; the expert kind says them, where layers have them in common."""
        if self.per_layer is not None:
            return {}
        return {f"_experts.{name}": begins for name, begins in self.kind.shapes(self.num_experts, self.r).items()}

    @property
    def kind(self) -> type[Experts]:
        """Class of the experts."""
        return LowRankExperts

    def summary(self) -> str:
        """See `MoeConfig.summary`."""
        by_layer = "" if self.per_layer is None else f", by layer {self.per_layer}"
        return f"{self.num_experts} experts of rank {self.r}, {self.router_summary()}{by_layer}"


@dataclass
class RoutedMoeConfig(MixtureConfig, CapacityConfig):
    """All shared fields, for adapter types that take several routers."""

    def validate(self) -> None:
        """Check every field; see `MoeConfig.validate`."""
        super().validate()
        if self.task_type != "CAUSAL_LM" or self.allow_non_causal:
            return
        parts = () if self.router == BACKBONE else router_parts(self.router, self.scorer, self.gate)
        for part in (*parts, self.kind):
            unsafe = "a later token changes an earlier one" if not part.causal else "other rows change a token"
            hint = f"another one for a causal language model, or allow_non_causal=True: with {part.__name__} {unsafe}"
            name = "experts" if part is self.kind else "router"
            self._check(part.causal and part.batch_invariant, name, hint)


def is_coefficient(value: float) -> bool:
    """Whether a number can be the weight of a loss: zero, or one that float32 keeps through a training step."""
    return value == 0 or SMALLEST <= value <= LARGEST
