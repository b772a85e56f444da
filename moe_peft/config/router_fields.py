"""Fields of routers: which one decides, among how many experts, how many of them a token uses, and who is full."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..messages import shown, warn
from ..options import option_values
from ..place import Place
from ..routers import (
    DEFAULT_GATE,
    DEFAULT_ROUTER,
    DEFAULT_SCORER,
    SELECTORS,
    router_fields,
    router_names,
    router_parts,
)
from .config import BACKBONE, MoeConfig
from .layer_sizes import (
    SIZES,
    distinct_places,
    layer_places,
    may_lie_outside,
    sizes_at,
    with_sizes,
    wrong_sizes,
)
from .meaning import NOT_MEANING
from .outside import YOUR_OWN
from .ranges import LARGEST, MAX_EXPERTS

# Batch column with the group of each sample, where a configuration names no other.
GROUP_COLUMN = "task_type"


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
    _of_model: ClassVar[tuple[Place, ...]] = ()  # an instance that is resolved for a model has its places

    num_experts: int = field(default=8, metadata={"help": "Experts at each adapted layer."})
    router: str = field(
        default=DEFAULT_ROUTER,
        metadata={"help": f"Name of the rule that selects: {', '.join(SELECTORS)}, or of a whole router."},
    )
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
        self._check_choice("router", (*known, BACKBONE), YOUR_OWN)
        self._check(
            self.router != BACKBONE or self.placement in ("experts", "slices"),
            "router",
            f"one of {', '.join(map(shown, known))}: only adapters around the backbone's experts follow its routing",
        )
        for name in sorted(self._idle_fields()):
            self._check_left_alone(name, f"the {shown(self.router)} router does not use it", of_group=True)
        if self.per_layer is not None:
            own = {entry.name for entry in dataclasses.fields(self)} - self._idle_fields()
            sizes = [name for name in SIZES if name in own and (name == "r" or self.router != BACKBONE)]
            reason = wrong_sizes(self, sizes)
            self._check(reason is None, "per_layer", reason or "")

    def classes(self) -> list[type]:
        """See `MoeConfig.classes`."""
        named = self.router in router_names()
        return [*super().classes(), *(router_parts(self.router, self.scorer, self.gate) if named else ())]

    def at(self, place: Place) -> RouterConfig:
        """See `MoeConfig.at` and `layer_sizes`."""
        return self if self.per_layer is None else with_sizes(self, sizes_at(self.per_layer, place))

    def typical_places(self) -> list[Place]:
        """See `MoeConfig.typical_places`."""
        if self.per_layer is None:
            return super().typical_places()
        if self._of_model:
            return list(self._of_model)
        # Outside of the numbered layers the plain fields hold; a choice of layers leaves such modules out.
        named = self.layer_selection[0] is None and may_lie_outside(self.target_modules)
        return [*(super().typical_places() if named else []), *layer_places(self.per_layer)]

    def keep_places(self, places: Sequence[Place]) -> None:
        """See `MoeConfig.keep_places`."""
        own = () if self.per_layer is None else distinct_places(self.per_layer, places)
        self._of_model = tuple(own)  # type: ignore[misc]

    @property
    def group_columns(self) -> dict[str, frozenset[int]]:
        """See `MoeConfig.group_columns`; a router that reads the groups may know which ones there are."""
        named = self.router in router_names()
        parts = router_parts(self.router, self.scorer, self.gate) if named else ()
        known = [part.known_groups(option_values(part, self.router_args)) for part in parts]
        reads = any("groups" in part.context_needs for part in parts)
        return {GROUP_COLUMN: frozenset[int]().union(*known)} if reads else {}

    def sizes_at(self, place: Place) -> dict[str, int]:
        """See `MoeConfig.sizes_at`."""
        own = self.at(place)
        return {name: getattr(own, name) for name in SIZES if name in (self.per_layer or {})}

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
        self._check(not needed or self.top_k is not None, "top_k", f"set for the {shown(self.router)} router")

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
            "help": "Who is served first: 'position' (tokens in order), or, not causal, 'choice' (first choices "
            "first) or 'probability' (largest first)."
        },
    )
    allow_non_causal: bool = field(
        default=False,
        metadata={"help": "Permit parts with which a later token changes an earlier one's output.", **NOT_MEANING},
    )

    @property
    def permits_non_causal(self) -> bool:
        """See `MoeConfig.permits_non_causal`."""
        return self.allow_non_causal

    def validate(self) -> None:
        """Check every field; see `MoeConfig.validate`."""
        super().validate()
        hint = f"a positive number or None, at most {LARGEST:g}"
        self._check(self.capacity_factor is None or 0 < self.capacity_factor <= LARGEST, "capacity_factor", hint)
        self._check_choice("capacity_order", ("position", "choice", "probability"))
        if self.capacity_order != "position" and self.task_type == "CAUSAL_LM":
            self._check(
                self.allow_non_causal,
                "capacity_order",
                "'position' for a causal language model: else a later token takes an earlier token's place. "
                "To train with it all the same, set allow_non_causal=True",
            )
