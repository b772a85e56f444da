"""The general routed adapter: any router, expert kind and losses, by name.

    y = W0 x + routed sum of the experts;   loss = task loss + sum over layers and losses of coef * loss

The named methods are presets of the same parts: `RoutedConfig(router="dense", losses={"localized_balancing": 0.1})` is
LoRAMoE, `RoutedConfig(router="capacity", top_k=4, ...)` is SiRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ..config.absent import accepts_absent
from ..config.config import BACKBONE
from ..config.field_types import fits
from ..config.meaning import NOT_MEANING
from ..config.outside import YOUR_OWN
from ..config.parts import RoutedParts
from ..config.ranges import IN_RANGE, is_coefficient
from ..experts import EXPERTS, Experts
from ..experts.bottleneck import ACTIVATIONS
from ..losses import LOSSES
from ..messages import shown, warn
from ..options import check_options, check_sizes, option_values
from ..part import Part
from ..place import Place
from ..routers import GATES, SCORERS, SELECTORS, router_learns, router_names
from ..routers.registry import lets_nothing_pass, router_parts
from ..tuner.registration import extend_peft_type, register
from ..tuner.tuner import RoutedTuner
from ..types import RouterLoss
from .build import build_parts
from .localized import LocalizedBalancingConfig
from .scale import WITHOUT_SCALE, PacedConfig

PEFT_TYPE = extend_peft_type("ROUTED")


@accepts_absent
@dataclass
class RoutedConfig(LocalizedBalancingConfig, PacedConfig):
    """Configuration of the general routed adapter."""

    method: ClassVar[str] = "Routed experts"
    equation: ClassVar[str] = "y = W0 x + sum_e router(x)_e expert_e(x)"
    source: ClassVar[str] = "docs of peft-moe"
    adapter_type: ClassVar[str] = "ROUTED"
    default_targets: ClassVar[Literal["ffn", "attention", "all"]] = "ffn"

    router: str = field(
        default="top_k",
        metadata={"help": "Name of the rule that selects, see moe_peft.routers.SELECTORS, or of a whole router."},
    )
    scorer: str = field(  # type: ignore[misc]
        default="linear", metadata={"help": "Name of what scores the experts, see moe_peft.routers.SCORERS."}
    )
    gate: str = field(  # type: ignore[misc]
        default="softmax", metadata={"help": "Name of the gate function of the scores, see moe_peft.routers.GATES."}
    )
    router_scope: str = field(
        default="place",
        metadata={
            "help": "'place': every place has a router of its own. 'block': the first adapted linear layer of a "
            "module decides for the others in it, as for the three of an FFN."
        },
    )
    top_k: int | None = field(
        default=None,
        metadata={"help": "Experts a token uses; None means 2 with a sparse router, and all with the dense one."},
    )
    wraps: str = field(
        default="linear",
        metadata={
            "help": "What the adapter stands beside: 'linear' layers, 'block' (mixture-of-experts blocks, or the MLPs "
            "of a dense model), or 'experts' (a backbone's experts modules)."
        },
    )
    activation: str = field(default="silu", metadata={"help": f"Of the kind 'bottleneck': {', '.join(ACTIVATIONS)}."})
    experts: str = field(
        default="low_rank", metadata={"help": "Name of the expert kind, see moe_peft.experts.EXPERTS."}
    )
    router_aux_loss_coef: float = field(
        default=0.01,
        metadata={
            "help": "Weight of load_balancing per layer, or of importance with the dense router; without effect where "
            "the router learns nothing."
        },
    )
    losses: dict[str, float | dict[str, Any]] | None = field(
        default=None,
        metadata={
            "help": "Further router losses, name -> weight per layer, or name -> {'weight': ..., and the loss's own "
            "options}, see moe_peft.losses.LOSSES.",
            **NOT_MEANING,
        },
    )
    router_args: dict[str, Any] | None = field(  # type: ignore[misc]
        default=None, metadata={"help": "Options of scorer, gate and selector by name, as their classes declare them."}
    )
    experts_args: dict[str, Any] | None = field(  # type: ignore[misc]
        default=None, metadata={"help": "Options of the expert kind by name, as its class declares them."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE

    def _fill_in(self) -> None:
        super()._fill_in()
        names = (SCORERS, self.scorer), (GATES, self.gate)
        known = self.router in router_names() and all(name in registry for registry, name in names)
        if self.top_k is None and known and "top_k" in self.router_fields():
            self.top_k = min(2, self.num_experts)

    @property
    def placement(self) -> str:
        """See `MoeConfig.placement`; a kind of experts may act in another way on what is wrapped."""
        own = EXPERTS[self.experts].placement if self.experts in EXPERTS else None
        return own or self.wraps

    @property
    def shares_decisions(self) -> bool:
        """See `MoeConfig.shares_decisions`."""
        return self.router_scope == "block"

    def validate(self) -> None:
        """Check every field; see `MoeConfig.validate`."""
        self._check_choice("wraps", ("linear", "block", "experts"))
        self._check_choice("router_scope", ("place", "block"))
        alone = self.router_scope == "place" or self.wraps == "linear"
        self._check(alone, "router_scope", f"'place': wraps={shown(self.wraps)} has one place in a block")
        self._check_choice("scorer", tuple(SCORERS), YOUR_OWN)
        self._check_choice("gate", tuple(GATES), YOUR_OWN)
        super().validate()
        self._check_choice("experts", tuple(EXPERTS), YOUR_OWN)
        within = self.wraps == "block" or self.kind.placement is None
        self._check(within, "wraps", f"'block' with the kind {shown(self.experts)}, which acts inside of an FFN")
        self._check_choice("activation", tuple(ACTIVATIONS))
        hint = f"'linear' with the kind {shown(self.experts)}, which starts from a weight"
        self._check(self.wraps == "linear" or not self.kind.reads_weight, "wraps", hint)
        if "activation" not in self.kind.fields:
            self._check_left_alone("activation", f"the kind {shown(self.experts)} has none")
        if "scaling" not in self.kind.fields:
            hint = f"left at None: the kind {shown(self.experts)} has no scale"
            self._check(self.lora_alpha == WITHOUT_SCALE, "lora_alpha", hint)
            self._check_left_alone("use_rslora", f"the kind {shown(self.experts)} has no scale")
        self._check(
            self.expert_groups is None or "localized_balancing" in (self.losses or {}),
            "expert_groups",
            "None without the loss that reads it; set its weight, as in losses={'localized_balancing': 0.1}",
        )
        for name in ("lora_dropout", "experts_implementation"):
            if name not in self.kind.fields:
                self._check_left_alone(name, f"the kind {shown(self.experts)} does not use it")
        if self.router == BACKBONE:
            self._check_left_alone("num_experts", "there is one expert for each of the backbone's")
        self._validate_parts()
        if not self._router_learns():
            self._check(not self.losses, "losses", f"None: the {shown(self.router)} router learns nothing")
            self._check_left_alone("router_z_loss_coef", f"the {shown(self.router)} router learns nothing")
        self._validate_losses()

    def _validate_parts(self) -> None:
        """Check that the parts of the router and the kind of experts go together, and their options."""
        parts, given = self._router_parts(), self._router_gives() | self.kind.gives
        for name, part in zip(("scorer", "gate", "router")[-len(parts) :], parts, strict=False):
            lacking = part.needs - given
            giving = [own for known in (SCORERS, GATES, EXPERTS) for own in known if lacking <= known[own].gives]
            hint = f"one that needs no {', '.join(sorted(lacking))}, or beside a part that gives it: {giving}"
            self._check(not lacking, name, hint)
        if self.router in SELECTORS:
            dead = lets_nothing_pass(SCORERS[self.scorer], GATES[self.gate])
            hint = f"one that scores below zero pass, as 'softmax': {shown(self.scorer)} scores by logarithms"
            self._check(not dead, "gate", f"{hint} of probabilities, and no expert would ever be used")
        owner = type(self).__name__
        for field_name, own, options in (
            ("router_args", parts, self.router_args),
            ("experts_args", (self.kind,), self.experts_args),
        ):
            check_options(own, options, f"{owner}: {field_name}")
            check_sizes(own, options, self._sizes(), f"{owner}: {field_name}")
        further = self.kind.further_choices(option_values(self.kind, self.experts_args))
        hint = f"None with the kind {shown(self.experts)}, which has {further} experts besides"
        self._check(self.expert_groups is None or not further, "expert_groups", hint)

    def _sizes(self) -> dict[str, int]:
        """Sizes of a layer, as parts are asked about them."""
        sizes = {"num_experts": self.num_experts, "top_k": self.top_k, "r": self.r}
        return {name: size for name, size in sizes.items() if size is not None}

    def _router_parts(self) -> tuple[type[Part], ...]:
        return () if self.router == BACKBONE else router_parts(self.router, self.scorer, self.gate)

    def advise(self) -> None:
        """See `MoeConfig.advise`."""
        super().advise()
        learns = self._router_learns() and self.router in SELECTORS
        for name in self._coefficients() if learns and not GATES[self.gate].sums_to_one else ():
            if LOSSES[name].of_softmax:
                warn(
                    f"{type(self).__name__}: the loss {shown(name)} keeps the softmax's normaliser small, and the "
                    f"gate {shown(self.gate)} has none, so that its weight has no meaning here. Leave it out, or use "
                    "the gate 'softmax'."
                )

    def _validate_losses(self) -> None:
        for name in self.losses or {}:
            known = f"a dict with names out of {', '.join(map(shown, LOSSES))}{YOUR_OWN}"
            self._check(name in LOSSES, "losses", known)
            coef, options = self._loss_settings(name)
            hint = f"a dict with weights that are zero or positive numbers {IN_RANGE}, as {{{shown(name)}: 0.1}} or "
            hint += f"{{{shown(name)}: {{'weight': 0.1, ...}}}}"
            self._check(fits(coef, float) and is_coefficient(coef), "losses", hint)
            owner = f"{type(self).__name__}: losses[{shown(name)}]"
            check_options((LOSSES[name],), options, owner)
            check_sizes((LOSSES[name],), options, self._sizes(), owner)
            lacking = LOSSES[name].needs - self._router_gives()
            self._check(
                not lacking,
                "losses",
                f"without {shown(name)} for the {self.router} router, which gives no {', '.join(sorted(lacking))}; "
                f"use {' or '.join(map(shown, self._losses_that_fit()))}",
            )
            shorthand = {self._balance_name(): "router_aux_loss_coef", "z_loss": "router_z_loss_coef"}.get(name)
            self._check(
                shorthand is None or getattr(self, shorthand) == 0,
                "losses",
                f"without {shown(name)} while {shorthand} sets its weight too; set {shorthand}=0.0",
            )

    def _router_learns(self) -> bool:
        return self.router != BACKBONE and router_learns(self.router, self.scorer, self.gate)

    def _router_gives(self) -> frozenset[str]:
        return frozenset().union(*(part.gives for part in self._router_parts()))

    def _losses_that_fit(self) -> list[str]:
        return [name for name, loss in LOSSES.items() if loss.needs <= self._router_gives()]

    def _balance_name(self) -> str:
        """The balance loss of a router: of the requests where it selects, of the gate mass where it does not."""
        return "load_balancing" if LOSSES["load_balancing"].needs <= self._router_gives() else "importance"

    @property
    def kind(self) -> type[Experts]:
        """See `MixtureConfig.kind`."""
        return EXPERTS[self.experts]

    def classes(self) -> list[type]:
        """See `MoeConfig.classes`."""
        return [*super().classes(), *(LOSSES[name] for name in self.losses or {})]

    def card_fields(self) -> list[str]:
        """See `MoeConfig.card_fields`."""
        activation = ["activation"] if "activation" in self.kind.fields else []
        return ["wraps", "experts", *activation, *super().card_fields()]

    def expected_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `MoeConfig.expected_shapes`."""
        return {} if self.router == BACKBONE else super().expected_shapes()

    def build(self, place: Place) -> RoutedParts:
        """Build the parts of one layer; see `MoeConfig.build`."""
        if not self._router_learns():
            return build_parts(self, place, losses={}, experts=self.experts)
        losses = {name: (self._loss(name), coef) for name, coef in self._coefficients().items()}
        return build_parts(self, place, losses=losses, experts=self.experts)

    def _coefficients(self) -> dict[str, float]:
        """Weights of the losses by name, those that are not zero."""
        weights = {
            self._balance_name(): self.router_aux_loss_coef,
            "z_loss": self.router_z_loss_coef,
            **{name: self._loss_settings(name)[0] for name in self.losses or {}},
        }
        return {name: weight for name, weight in weights.items() if weight != 0}

    def _loss(self, name: str) -> RouterLoss:
        loss = LOSSES[name]
        values = {keyword: getattr(self, own) for keyword, own in loss.config_fields.items()}
        return loss(**values, **option_values(loss, self._loss_settings(name)[1]))

    def _loss_settings(self, name: str) -> tuple[Any, dict[str, Any]]:
        """Weight of a loss, and its options."""
        given = (self.losses or {}).get(name)
        if not isinstance(given, Mapping):
            return given, {}
        return given.get("weight"), {key: value for key, value in given.items() if key != "weight"}


class RoutedModel(RoutedTuner):
    """Tuner of general routed adapters."""

    prefix: str = "routed_"


register(RoutedConfig, RoutedModel)
