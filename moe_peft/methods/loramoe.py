"""LoRAMoE: FFN layers with a dense softmax over low-rank experts, and localized balancing.

    g = softmax(Wg x)
    y = W0 x + (alpha / r) sum_e g_e B_e A_e x
    loss = task loss + coef * sum over layers of var(I * Q) / mean(I * Q)^2

Dou et al., 2023, arXiv 2312.09979. The squared mean in the loss follows the authors' code, which they confirmed is
what they used. One dropout mask serves all experts of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ..config.absent import TARGET_PARAMETERS, Absent, absent, accepts_absent
from ..config.fields import MixtureConfig
from ..config.parts import RoutedParts
from ..config.router_fields import CapacityConfig, TopKConfig
from ..forward.objective import Loss
from ..losses import z_loss
from ..place import Place
from ..tuner.registration import extend_peft_type, register
from ..tuner.tuner import RoutedTuner
from .build import build_parts
from .localized import LocalizedBalancingConfig

PEFT_TYPE = extend_peft_type("LORAMOE")
ROUTES_DENSELY = "LoRAMoE routes densely; RoutedConfig takes any router"


@accepts_absent
@dataclass
class LoraMoeConfig(LocalizedBalancingConfig, MixtureConfig):
    """Configuration of LoRAMoE; defaults are the paper's.

    The paper's constraint needs `expert_groups` and a batch column with the group of each sample; without groups the
    same loss balances all experts evenly, and experts of equal weight do what one LoRA of rank `num_experts * r`
    does: without groups the loss works against what a router could learn.
    """

    method: ClassVar[str] = "LoRAMoE"
    equation: ClassVar[str] = "y = W0 x + (alpha / r) sum_e softmax(Wg x)_e B_e A_e x"
    source: ClassVar[str] = "arXiv 2312.09979"
    adapter_type: ClassVar[str] = "LORAMOE"
    default_targets: ClassVar[Literal["ffn", "attention", "all"]] = "ffn"
    fixed_fields: ClassVar[dict[str, str]] = {"router": ROUTES_DENSELY}
    absent_fields: ClassVar[Absent] = {
        **TARGET_PARAMETERS,
        **absent(TopKConfig, ROUTES_DENSELY),
        **absent(CapacityConfig, ROUTES_DENSELY),
    }

    r: int = field(default=4, metadata={"help": "Rank of one expert (paper: 4)."})
    lora_alpha: float = field(default=32, metadata={"help": "The routed sum is times lora_alpha / r (paper: 32)."})
    lora_dropout: float = field(
        default=0.05, metadata={"help": "Dropout on the experts' input (authors' code: 0.05)."}
    )
    num_experts: int = field(default=6, metadata={"help": "Experts at each layer (paper: 6, three per group)."})
    router_aux_loss_coef: float = field(
        default=0.1, metadata={"help": "Weight of localized balancing, per layer (paper's beta: 0.1)."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE

    def build(self, place: Place) -> RoutedParts:
        """Build the parts of one layer; see `MoeConfig.build`."""
        losses: dict[str, tuple[Loss, float]] = {
            "localized_balancing": (self.localized_balancing(), self.router_aux_loss_coef),
            "z_loss": (z_loss, self.router_z_loss_coef),
        }
        return build_parts(self, place, losses=losses)


class LoraMoeModel(RoutedTuner):
    """Tuner of LoRAMoE adapters."""

    prefix: str = "loramoe_"


register(LoraMoeConfig, LoraMoeModel)
