"""Fields of experts that are pairs of low-rank matrices: their rank, scale, start, and how their sum is computed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..ops import AUTO, IMPLEMENTATIONS
from .config import MoeConfig
from .meaning import NOT_MEANING
from .ranges import IN_RANGE, LARGEST, MAX_RANK, SMALLEST


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
