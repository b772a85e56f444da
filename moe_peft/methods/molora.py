"""MoLORA: attention and FFN layers with a softmax over low-rank experts, mixed by their outputs.

    p = softmax(Wg x)
    y = W0 x + (alpha / r) sum_e p_e B_e A_e x

Zadouri et al., 2023, arXiv 2309.05444. Routing is dense; with `top_k` only the largest weights are kept, not
rescaled. There is no router loss. Router and A start normal with standard deviation 0.02, B at zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ..config.absent import TARGET_PARAMETERS, Absent, absent, accepts_absent
from ..config.fields import MixtureConfig
from ..config.parts import RoutedParts
from ..config.router_fields import CapacityConfig, TopKConfig
from ..forward.objective import Loss
from ..losses import importance, z_loss
from ..place import Place
from ..tuner.registration import extend_peft_type, register
from ..tuner.tuner import RoutedTuner
from .build import build_parts

PEFT_TYPE = extend_peft_type("MOLORA")


@accepts_absent
@dataclass
class MoloraConfig(MixtureConfig, TopKConfig):
    """Configuration of MoLORA; defaults are the released recipe's."""

    method: ClassVar[str] = "MoLORA"
    equation: ClassVar[str] = "y = W0 x + (alpha / r) sum_e softmax(Wg x)_e B_e A_e x"
    source: ClassVar[str] = "arXiv 2309.05444"
    adapter_type: ClassVar[str] = "MOLORA"
    default_targets: ClassVar[Literal["ffn", "attention", "all"]] = "all"
    absent_fields: ClassVar[Absent] = {
        **TARGET_PARAMETERS,
        **absent(CapacityConfig, "MoLORA's routers have no capacity; SiraConfig and RoutedConfig have"),
    }

    r: int = field(default=4, metadata={"help": "Rank of one expert (released recipe: 4)."})
    lora_alpha: float = field(
        default=16, metadata={"help": "The routed sum is times lora_alpha / r (released recipe: 16)."}
    )
    num_experts: int = field(default=10, metadata={"help": "Experts at each layer (released recipe: 10)."})
    init_weights: bool | str = field(
        default="gaussian",
        metadata={
            "help": "'gaussian': A normal with standard deviation 0.02, B zero. True: A uniform. False: both random."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE

    def _fill_in(self) -> None:
        if self.top_k is not None and self.router == "dense":
            self.router = "top_k"

    def validate(self) -> None:
        """Check every field; see `MoeConfig.validate`."""
        self._check_choice("router", ("dense", "top_k"))
        super().validate()

    def build(self, place: Place) -> RoutedParts:
        """Build the parts of one layer; see `MoeConfig.build`."""
        losses: dict[str, tuple[Loss, float]] = {
            "importance": (importance, self.router_aux_loss_coef),
            "z_loss": (z_loss, self.router_z_loss_coef),
        }
        return build_parts(self, place, losses=losses, router_init_std=0.02)


class MoloraModel(RoutedTuner):
    """Tuner of MoLORA adapters."""

    prefix: str = "molora_"


register(MoloraConfig, MoloraModel)
