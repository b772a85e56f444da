"""Expert LoRA: a low-rank pair on each matrix of each of the backbone's own experts, or of the selected ones.

    y = sum_k w_k W2'_{i_k} gate(W1'_{i_k} x),      W' = W + s B A,  s = lora_alpha / r

LoRA (Hu et al., 2021, arXiv 2106.09685) expert by expert, under the backbone's own routing. It is what stock peft does
with `target_parameters`, computed in activation space: with dropout, on selected experts, and on 4-bit ones. Linear
layers named in `target_modules` get plain LoRA of the same rank and scale in the same adapter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from ..backbone.local_experts import SPLIT_LIKE_EXPERTS, is_split_alone
from ..backbone.structure import base_of
from ..config.absent import TARGET_PARAMETERS, Absent, absent, accepts_absent
from ..config.config import BACKBONE
from ..config.fields import MixtureConfig, PlacingConfig, RouterLossConfig
from ..config.layer_sizes import sizes_at, with_sizes, wrong_sizes
from ..config.meaning import NOT_MEANING
from ..config.pair_fields import LowRankConfig, PairConfig
from ..config.parts import RoutedParts
from ..config.ranges import MAX_RANK
from ..config.router_fields import CapacityConfig, RouterConfig, TopKConfig
from ..experts import LowRankExperts, Selection
from ..experts.expert_pairs import MATRICES, ExpertPairs
from ..layers.fused_experts import matrix_names, stored_shape, why_not_fused
from ..messages import shown
from ..place import MoeLayer, Place
from ..places.blocks import experts_names
from ..places.linear import linear_names, shortest_endings
from ..routers.constant import ConstantRouter
from ..tuner.registration import extend_peft_type, register
from ..tuner.tuner import RoutedTuner
from .selected_experts import SelectedExpertsConfig

RANK_PATTERN = r"(.*\.)?({})$"  # which modules a key of rank_pattern means
PEFT_TYPE = extend_peft_type("EXPERT_LORA")
ROUTED_BY_BACKBONE = "the backbone routes; PerftConfig and RoutedConfig have routers of their own"
ROUTING_GROUPS = (RouterConfig, TopKConfig, CapacityConfig, RouterLossConfig, MixtureConfig)


@accepts_absent
@dataclass
class ExpertLoraConfig(SelectedExpertsConfig, PairConfig, PlacingConfig):
    """Configuration of expert LoRA."""

    method: ClassVar[str] = "Expert LoRA"
    equation: ClassVar[str] = "y = sum_k w_k FFN'_{i_k}(x), with W + (alpha / r) B A for each matrix W of FFN'"
    source: ClassVar[str] = "arXiv 2106.09685"
    adapter_type: ClassVar[str] = "EXPERT_LORA"
    weight_fields: ClassVar[tuple[str, ...]] = ("experts",)
    absent_fields: ClassVar[Absent] = {
        **TARGET_PARAMETERS,
        **{
            name: own
            for group in ROUTING_GROUPS
            for name, own in absent(group, ROUTED_BY_BACKBONE, router=BACKBONE).items()
            if name != "per_layer"
        },
        **absent(LowRankConfig, "the way through the experts is chosen by the number of tokens"),
    }

    experts: dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "help": "Experts with pairs, by decoder layer: {'1': [8, 26], '2': [5]}, as select_experts writes it; "
            "None for all of them."
        },
    )
    r: int = field(default=16, metadata={"help": "Rank of a pair, and of LoRA on linear layers."})
    lora_alpha: float = field(default=32, metadata={"help": "Scale: a pair is times lora_alpha / r."})
    rank_pattern: dict[str, int] | None = field(
        default=None,
        metadata={
            "help": "Ranks that differ from r, by the end of a module's name or a regex for it, as in peft: "
            "{'layers.0.mlp.experts': 4, 'q_proj': 8}.",
            "pattern": RANK_PATTERN,
            "patterns_in_lists": True,
        },
    )
    per_layer: dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "help": "Ranks by layer, from the first to the last: {'r': [4, 8]} gives the first half of the layers "
            "rank 4 and the second rank 8; rank_pattern goes before it."
        },
    )
    target_matrices: list[str] | None = field(
        default=None,
        metadata={
            "help": "Matrices of an expert with a pair: 'gate_up' (the joined gate and up matrix, or the up matrix of "
            "experts without a gate) and 'down'; None for both."
        },
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Linear layers that get LoRA in the same adapter, beside the experts, which need not be named: "
            "names, a regex, or 'all-linear'. None for none.",
            **NOT_MEANING,
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE

    def _fill_in(self) -> None:
        if self.target_matrices is None:
            self.target_matrices = list(MATRICES)
        elif isinstance(self.target_matrices, tuple):
            self.target_matrices = list(self.target_matrices)

    @property
    def placement(self) -> str:
        """Kind of layer around the experts module."""
        return "matrices"

    def placement_at(self, place: Place) -> str:
        """Linear layers beside the experts have another kind."""
        return "linear" if place.num_experts is None else self.placement

    @property
    def mergeable(self) -> bool:
        """See `MoeConfig.mergeable`; every pair belongs to a matrix."""
        return ExpertPairs.mergeable

    def validate(self) -> None:
        """Check every field; see `MoeConfig.validate`."""
        super().validate()
        chosen = self.target_matrices
        self._check(
            isinstance(chosen, list)
            and bool(chosen)
            and set(chosen) <= set(MATRICES)
            and len(set(chosen)) == len(chosen),
            "target_matrices",
            f"a list of different names among {', '.join(map(shown, MATRICES))}",
        )
        for pattern, rank in (self.rank_pattern or {}).items():
            hint = f"a dict from names to ranks of 1 to {MAX_RANK}, which {shown(pattern)}: {shown(rank)} is not"
            fits = isinstance(pattern, str) and type(rank) is int and 1 <= rank <= MAX_RANK
            self._check(fits, "rank_pattern", hint)
            try:
                re.compile(pattern)
            except re.error as error:
                self._check(False, "rank_pattern", f"of names or regular expressions; {shown(pattern)}: {error}")
        if self.per_layer is not None:
            reason = wrong_sizes(self, ("r",))
            self._check(reason is None, "per_layer", reason or "")
        if self.experts is not None:
            for name in ("layers_to_transform", "layers_pattern"):
                self._check(getattr(self, name) is None, name, "None, as `experts` names the layers")

    def at(self, place: Place) -> ExpertLoraConfig:
        """See `MoeConfig.at` and `layer_sizes`."""
        return self if self.per_layer is None else with_sizes(self, sizes_at(self.per_layer, place))

    def sizes_at(self, place: Place) -> dict[str, int]:
        """See `MoeConfig.sizes_at`."""
        return {} if self.per_layer is None else {"r": self.at(place).rank_at(place.name)}

    def rank_at(self, name: str) -> int:
        """Rank at a module.

        Args:
            name: Its full name.
        """
        patterns = self.rank_pattern or {}
        return next(
            (r for pattern, r in patterns.items() if re.match(RANK_PATTERN.replace("{}", pattern), name)), self.r
        )

    def scaling_at(self, name: str) -> float:
        """Factor s at a module; argument as in `rank_at`."""
        rank = self.rank_at(name)
        return self.lora_alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def resolve(self, model: nn.Module, layers: Sequence[MoeLayer]) -> None:
        """Check the experts, and name them among the modules to adapt; see `MoeConfig.resolve`.

        Raises:
            ValueError: The model has no experts that pairs can be put on, the selection does not fit it, or a pattern
                of ranks matches no module.
        """
        every = experts_names(model, list(layers))  # refuses a model without any, with the reason
        chosen = every if self.experts is None else [layer.experts for layer in self.selected_layers(layers)]
        modules = dict(model.named_modules())
        for name in chosen:
            self._check_experts(name, base_of(modules[name]))
        for pattern in self.rank_pattern or {}:
            found = any(_means(pattern, name) for name in modules)
            self._check(found, "rank_pattern", f"of names of the model's modules; none is called {shown(pattern)}")
        self._add_targets(model, chosen, modules)

    def _check_experts(self, name: str, experts: nn.Module) -> None:
        reason = why_not_fused(experts)
        if reason is None and is_split_alone(experts):
            raise ValueError(
                f"{type(self).__name__}: {name} ({type(experts).__name__}) is split over processes, so no pairs can "
                f"be put on its matrices. {SPLIT_LIKE_EXPERTS} Or use PerftConfig(variant='E'), which stands beside "
                "the experts; or load the model without distributed_config, and add the adapter before sharding with "
                "FSDP2."
            )
        if reason is not None:
            raise ValueError(
                f"{type(self).__name__}: {name} ({type(experts).__name__}) {reason}, so no pairs can be put on its "
                "matrices. Use PerftConfig(variant='E'), which stands beside the experts, or an adapter around blocks."
            )

    def _add_targets(self, model: nn.Module, chosen: list[str], modules: dict[str, nn.Module]) -> None:
        """Name the experts in `target_modules`, beside the linear layers that are there."""
        targets = self.target_modules
        endings = set(shortest_endings(chosen, set(modules) - set(chosen)))
        if targets is None:
            self.target_modules = endings  # type: ignore[assignment]
        elif targets == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            names = linear_names(model)
            self.target_modules = endings | set(shortest_endings(names, set(modules) - set(names)))  # type: ignore[assignment]
        elif isinstance(targets, str):
            if not all(re.fullmatch(targets, name) for name in chosen):
                self.target_modules = rf"{targets}|(.*\.)?({'|'.join(map(re.escape, sorted(endings)))})"
        elif not all(check_target_module_exists(self, name) for name in chosen):
            self.target_modules = set(targets) | endings  # type: ignore[assignment]

    def adapts(self, layer: MoeLayer) -> bool:
        """All layers, or those with selected experts."""
        return self.experts is None or super().adapts(layer)

    def card_fields(self) -> list[str]:
        """See `MoeConfig.card_fields`."""
        own = ["r", "lora_alpha", "use_rslora", "rank_pattern", "per_layer", "lora_dropout", "target_matrices"]
        return [*own, "experts", "target_modules", "modules_to_save"]

    def summary(self) -> str:
        """See `MoeConfig.summary`."""
        if self.experts is None:
            return f"pairs of rank {self.r} on every expert of the backbone"
        count = sum(len(ids) for ids in self.experts.values())
        return f"pairs of rank {self.r} on {count} experts of the backbone"

    def build(self, place: Place) -> RoutedParts:
        """Build the parts of one layer; see `MoeConfig.build`."""
        own: dict[str, Any] = {
            "r": self.rank_at(place.name),
            "scaling": self.scaling_at(place.name),
            "lora_dropout": self.lora_dropout,
            "init_weights": self.init_weights,
        }
        if place.num_experts is None:
            bank = LowRankExperts(place.in_features, place.out_features, num_experts=1, **own)
            return RoutedParts(experts=bank, router=ConstantRouter(place.in_features, 1))
        assert place.base is not None
        chosen = None
        if self.experts is not None:
            chosen = Selection(self.experts[str(place.layer_index)], place.num_experts)
        count = place.num_experts if chosen is None else len(chosen)
        return RoutedParts(experts=ExpertPairs(self._widths(place.base), num_experts=count, **own), selection=chosen)

    def _widths(self, experts: nn.Module) -> dict[str, tuple[int, int]]:
        """Widths of input and output of the matrices with pairs."""
        names = matrix_names(experts)
        assert names is not None and self.target_matrices is not None
        widths: dict[str, tuple[int, int]] = {}
        for matrix, name in zip(MATRICES, names, strict=True):
            if matrix in self.target_matrices:
                _, first, second = stored_shape(experts, name)
                transposed = getattr(experts, "is_transposed", False)
                widths[matrix] = (first, second) if transposed else (second, first)
        return widths


class ExpertLoraModel(RoutedTuner):
    """Tuner of expert LoRA."""

    prefix: str = "expert_lora_"


register(ExpertLoraConfig, ExpertLoraModel)


def _means(pattern: str, name: str) -> bool:
    """Whether a key of `rank_pattern` means a module."""
    return re.match(RANK_PATTERN.replace("{}", pattern), name) is not None
