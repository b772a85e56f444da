"""PERFT: adapters in parallel to a whole mixture-of-experts block, routed or not.

    a_i(h) = s B_i A_i h,  s = lora_alpha / r     or, with experts="bottleneck",     a_i(h) = B_i act(A_i h)

    R (routed)     y = MoE(h) + sum_{j in top-k of softmax(Wr h)} softmax(Wr h)_j a_j(h)
    E (embedded)   y = sum_k w_k (FFN_{i_k}(h) + a_{i_k}(h)),  with the routing (i, w) of the backbone's frozen router
    D (dense)      y = MoE(h) + sum_m a_m(h)
    S (single)     D with one adapter

Liu et al., 2024 and 2025, arXiv 2411.08212 and 2508.02587. R takes its weights from its own router, so that the router
learns from the task; the authors' code for OLMoE takes the backbone's there. Balance of R's router is measured layer
by layer and equals one when even; the authors' pools all layers and equals k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, cast

from torch import nn

from ..config.absent import accepts_absent
from ..config.config import BACKBONE
from ..config.fields import RoutedMoeConfig
from ..config.parts import RoutedParts
from ..experts import EXPERTS, Experts, LowRankExperts
from ..experts.bottleneck import ACTIVATIONS
from ..forward.objective import Loss
from ..losses import load_balancing, z_loss
from ..messages import shown
from ..place import Place
from ..routers import router_gives, router_learns, router_names
from ..tuner.registration import extend_peft_type, register
from ..tuner.tuner import RoutedTuner
from .build import build_parts

PEFT_TYPE = extend_peft_type("PERFT")
# Variant -> the only values of fields that are left at None; R, whose router is its own, is free in all of them.
FIXED: dict[str, dict[str, object]] = {
    "R": {},
    "E": {"router": BACKBONE, "num_experts": None, "top_k": None, "router_aux_loss_coef": 0.0},
    "D": {"router": "constant", "top_k": None, "router_aux_loss_coef": 0.0},
    "S": {"router": "constant", "num_experts": 1, "top_k": None, "router_aux_loss_coef": 0.0},
}


@accepts_absent
@dataclass
class PerftConfig(RoutedMoeConfig):
    """Configuration of PERFT.

    On a dense model, R, D and S wrap the MLP of every layer: a parallel mixture of adapters.
    """

    method: ClassVar[str] = "PERFT"
    equation: ClassVar[str] = (
        "y = MoE(h) + (alpha / r) sum_j g_j B_j A_j h, with g from its own router (R), the backbone's (E), or 1 (D, S)"
    )
    source: ClassVar[str] = "arXiv 2508.02587"
    adapter_type: ClassVar[str] = "PERFT"
    init_choices: ClassVar[tuple[bool | str, ...]] = (True, False, "gaussian", "perft")

    variant: str = field(
        default="R",
        metadata={"help": "'R' (own router), 'E' (the backbone's), 'D' (all adapters added), or 'S' (one adapter)."},
    )
    r: int = field(
        default=16, metadata={"help": "Rank, or width of the bottleneck, of one adapter (authors' README: 16)."}
    )
    lora_alpha: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "The sum is times lora_alpha / r (None: 2 r, as in the authors' code)."}
    )
    lora_dropout: float = field(
        default=0.05, metadata={"help": "Dropout on the adapters' input (authors' code: 0.05)."}
    )
    init_weights: bool | str = field(
        default=True,
        metadata={
            "help": "True, 'gaussian' or False as elsewhere, or 'perft': A normal with variance 2 / r, B normal with "
            "standard deviation 1e-6, as in the authors' code, which starts close to the base model, not at it."
        },
    )
    num_experts: int | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Adapters at each block (R and D; None: 4). E has one per backbone expert."}
    )
    top_k: int | None = field(default=None, metadata={"help": "Adapters a token uses (R; None: 2)."})
    router: str | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Router of R (None: top_k); the other variants have none of their own."}
    )
    router_aux_loss_coef: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Weight of R's load balancing, per layer (None: 0.01, or 0 with the dense router)."},
    )
    experts: str = field(
        default="low_rank", metadata={"help": "'low_rank', or 'bottleneck' for adapters with an activation."}
    )
    activation: str = field(
        default="silu", metadata={"help": f"Activation of 'bottleneck' adapters: {', '.join(ACTIVATIONS)}."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE

    def _fill_in(self) -> None:
        self._check_choice("variant", tuple(FIXED))
        for name, value in {**self._defaults(), **FIXED[self.variant]}.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def _defaults(self) -> dict[str, object]:
        known = self.router in router_names()
        sparse = self.router is None or (known and load_balancing.needs <= router_gives(self.router))
        return {
            "router": "top_k",
            "num_experts": 4,
            "top_k": min(2, self.num_experts or 4) if sparse else None,
            "router_aux_loss_coef": 0.01 if sparse else 0.0,
            "lora_alpha": 2 * self.r,
        }

    @property
    def placement(self) -> str:
        """E wraps the experts module, the others the block."""
        return "experts" if self.variant == "E" else "block"

    def validate(self) -> None:
        """Check every field; see `MoeConfig.validate`."""
        for name, value in FIXED[self.variant].items():
            self._check(getattr(self, name) == value, name, f"left at None: variant {shown(self.variant)} fixes it")
        super().validate()
        self._check_choice("experts", tuple(name for name in EXPERTS if name in ("low_rank", "bottleneck")))
        self._check_choice("activation", tuple(ACTIVATIONS))
        if "scaling" not in self.kind.fields:
            hint = f"left at None: {shown(self.experts)} adapters have no scale"
            self._check(self.lora_alpha == 2 * self.r, "lora_alpha", hint)
            self._check_left_alone("use_rslora", f"{shown(self.experts)} adapters have no scale")
        if "activation" not in self.kind.fields:
            self._check_left_alone("activation", f"{shown(self.experts)} adapters have no activation")
        if self.variant == "R":
            self._validate_router()
        else:
            self._check_left_alone("router_z_loss_coef", f"variant {shown(self.variant)} has no router of its own")

    def _validate_router(self) -> None:
        learns = self.router != BACKBONE and router_learns(cast(str, self.router))
        self._check(learns, "router", "a router that learns, or variant 'E' or 'D'")
        self._check(
            load_balancing.needs <= router_gives(cast(str, self.router)) or self.router_aux_loss_coef == 0,
            "router_aux_loss_coef",
            f"left at None: with the {self.router} router every adapter takes every token, so that its load is even",
        )

    def expected_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `MoeConfig.expected_shapes`; E's number of experts is the backbone's."""
        return {} if self.variant == "E" else super().expected_shapes()

    @property
    def kind(self) -> type[Experts]:
        """See `MixtureConfig.kind`."""
        return EXPERTS[self.experts]

    def card_fields(self) -> list[str]:
        """See `MoeConfig.card_fields`."""
        activation = ["activation"] if "activation" in self.kind.fields else []
        return ["variant", "experts", *activation, *super().card_fields()]

    def summary(self) -> str:
        """See `MoeConfig.summary`."""
        kind = "of rank" if "scaling" in self.kind.fields else "of width"
        if self.variant == "E":
            return f"variant E, one adapter {kind} {self.r} for each expert of the backbone"
        return f"variant {self.variant}, {super().summary()}"

    def build(self, place: Place) -> RoutedParts:
        """Build the parts of one layer; see `MoeConfig.build`."""
        losses: dict[str, tuple[Loss, float]] = {
            "load_balancing": (load_balancing, self.router_aux_loss_coef or 0.0),
            "z_loss": (z_loss, self.router_z_loss_coef),
        }
        parts = build_parts(self, place, losses=losses, experts=self.experts, router_init_std=0.02)
        if self.init_weights == "perft":
            bank = cast(LowRankExperts, parts.experts)
            nn.init.normal_(bank.A, std=math.sqrt(2 / self.r))
            nn.init.normal_(bank.B, std=1e-6)
        return parts


class PerftModel(RoutedTuner):
    """Tuner of PERFT adapters."""

    prefix: str = "perft_"


register(PerftConfig, PerftModel)
