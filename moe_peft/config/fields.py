"""Groups of fields that adapter types share; a configuration is composed from those that mean something for it."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..experts import DEFAULT_EXPERTS, EXPERTS, Experts
from ..forward.joined_losses import SCOPES
from ..options import option_values
from ..routers import router_parts
from .config import BACKBONE, MoeConfig
from .meaning import NOT_MEANING
from .pair_fields import LowRankConfig
from .patterns import LISTS_IN_NAMES, NAMES_OR_PATTERN
from .ranges import IN_RANGE, LARGEST, SMALLEST, is_coefficient
from .router_fields import CapacityConfig, RouterConfig


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
        options = option_values(self.kind, self.experts_args)
        shapes = self.kind.saved_shapes(self.num_experts, self.r, options)
        return {f"_experts.{name}": begins for name, begins in shapes.items()}

    @property
    def kind(self) -> type[Experts]:
        """Class of the experts."""
        return EXPERTS[DEFAULT_EXPERTS]

    def classes(self) -> list[type]:
        """See `MoeConfig.classes`."""
        return [*super().classes(), self.kind]

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
