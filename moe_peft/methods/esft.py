"""ESFT: the experts of the backbone that a task uses most are trained, everything else is frozen.

    y = sum_k w_k FFN_{i_k}(x),    FFN_i trained where expert i is selected for the layer

Wang et al., 2024, arXiv 2407.01906; `moe_peft.score_experts` and `select_experts` choose the experts. Routing stays as
it is: tokens still go to frozen experts. With expert_adapter="lora", which is not in the paper, the selected experts
are frozen too, and each has a low-rank expert beside it, under the same routing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import ClassVar

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from ..backbone.expert_tensors import expert_tensors, keeps_slices
from ..backbone.local_experts import SPLIT_LIKE_EXPERTS, is_split_alone, local_experts
from ..backbone.offloaded import onloaded
from ..backbone.partitioned import gathered
from ..backbone.structure import base_of
from ..config.absent import TARGET_PARAMETERS, Absent, absent, accepts_absent
from ..config.config import BACKBONE
from ..config.fields import MixtureConfig, PlacingConfig, RouterLossConfig
from ..config.meaning import NOT_MEANING
from ..config.pair_fields import LowRankConfig
from ..config.parts import AROUND_WEIGHTS, RoutedParts
from ..config.router_fields import CapacityConfig, RouterConfig, TopKConfig
from ..experts import ExpertSlices, Selection
from ..ops import AUTO
from ..place import MoeLayer, Place
from ..places.blocks import experts_names
from ..tuner.registration import extend_peft_type, register
from ..tuner.tuner import RoutedTuner
from .build import build_experts
from .selected_experts import SelectedExpertsConfig

PEFT_TYPE = extend_peft_type("ESFT")
ROUTED_BY_BACKBONE = "the backbone routes; PerftConfig and RoutedConfig have routers of their own"
ROUTING_GROUPS = (RouterConfig, TopKConfig, CapacityConfig, RouterLossConfig, MixtureConfig)
LORA_FIELDS = ("r", "lora_alpha", "lora_dropout", "use_rslora", "init_weights")


@accepts_absent
@dataclass
class EsftConfig(SelectedExpertsConfig, LowRankConfig):
    """Configuration of ESFT."""

    method: ClassVar[str] = "ESFT"
    equation: ClassVar[str] = "y = sum_k w_k FFN_{i_k}(x), FFN_i trained where expert i is selected"
    source: ClassVar[str] = "arXiv 2407.01906"
    adapter_type: ClassVar[str] = "ESFT"
    absent_fields: ClassVar[Absent] = {
        **TARGET_PARAMETERS,
        **{
            name: own
            for group in ROUTING_GROUPS
            for name, own in absent(group, ROUTED_BY_BACKBONE, router=BACKBONE).items()
        },
        **absent(PlacingConfig, "`experts` names the layers"),
    }

    expert_adapter: str = field(
        default="full",
        metadata={"help": "'full' trains the selected experts' matrices, 'lora' a low-rank expert beside each."},
    )
    train_shared_experts: bool = field(
        default=False,
        metadata={"help": "Also train the experts that every token uses (authors' shared_experts).", **NOT_MEANING},
    )
    train_router: bool = field(
        default=False,
        metadata={"help": "Also train the backbone's routers of the layers in `experts`.", **NOT_MEANING},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE

    @property
    def default_learning_rate(self) -> float:
        """See `MoeConfig.default_learning_rate`: whole matrices are trained at the paper's."""
        return 1e-5 if self.expert_adapter == "full" else super().default_learning_rate

    @property
    def placement(self) -> str:
        """Kind of layer around the experts module."""
        return "slices" if self.expert_adapter == "full" else "experts"

    def validate(self) -> None:
        """Check every field; see `MoeConfig.validate`."""
        super().validate()
        self._check_choice("expert_adapter", ("full", "lora"))
        if self.expert_adapter == "full":
            hint = "left at 'auto', as whole matrices are trained; set expert_adapter='lora' for low-rank ones"
            # Files written before hold 'dense'.
            self._check(self.experts_implementation in (AUTO, "dense"), "experts_implementation", hint)
            for name in LORA_FIELDS:
                self._check_left_alone(name, "whole matrices are trained; set expert_adapter='lora' for low-rank ones")

    def resolve(self, model: nn.Module, layers: Sequence[MoeLayer]) -> None:
        """Check the selection, and name the further modules to train; see `MoeConfig.resolve`.

        Raises:
            ValueError: Nothing is selected, a layer or an expert does not exist, the model is not the one that the
                experts were selected in, it keeps its experts in another form than one slice of each, or what is
                trained beside them is quantized.
        """
        experts_names(model, list(layers))  # refuses a model without any, with the reason
        chosen = self.selected_layers(layers)
        self._check_targets(layers, chosen)
        for own in chosen:
            experts = base_of(model.get_submodule(own.experts))
            if self.expert_adapter == "full":
                _refuse_split(own.experts, experts)
            self._check(
                self.expert_adapter == "lora" or keeps_slices(experts, own.num_experts),
                "expert_adapter",
                f"'lora' for {own.experts} ({type(experts).__name__}), which does not keep one slice of 16 or 32 "
                "bit per expert",
            )
        further = self._further_modules(chosen)
        for name in further:
            _refuse_quantized(name, model.get_submodule(name))
        if further:
            self.modules_to_save = sorted({*(self.modules_to_save or []), *further})

    def _check_targets(self, layers: Sequence[MoeLayer], chosen: Sequence[MoeLayer]) -> None:
        """Refuse fields that leave out a layer with selected experts, or add one without."""
        expected = [layer.experts for layer in chosen]
        own = SimpleNamespace(target_modules=set(expected), modules_to_save=self.modules_to_save)
        whole = [name for name in expected if not check_target_module_exists(own, name)]
        self._check(
            not whole,
            "modules_to_save",
            f"other modules than those around selected experts, as it would train {whole} whole. Name parts beside "
            "the experts, or leave these layers out of `experts`",
        )
        if self.target_modules is None or self.target_modules == "all-linear":
            return
        found = [layer.experts for layer in layers if check_target_module_exists(self, layer.experts)]
        self._check(
            found == expected,
            "target_modules",
            f"None, as `experts` names the layers: it matches {found} here, and `experts` selects in {expected}",
        )

    def _further_modules(self, chosen: Sequence[MoeLayer]) -> list[str]:
        """Names of what is trained beside the selected experts."""
        names = [name for layer in chosen for name in layer.shared_experts] if self.train_shared_experts else []
        self._check(
            bool(names) or not self.train_shared_experts,
            "train_shared_experts",
            "False: no module beside the model's experts is called shared...; name others in modules_to_save",
        )
        routers = [layer.router for layer in chosen if layer.router is not None] if self.train_router else []
        self._check(
            bool(routers) or not self.train_router,
            "train_router",
            "False: no router stands beside the model's experts",
        )
        return names + routers

    @property
    def mergeable(self) -> bool:
        """See `MoeConfig.mergeable`; trained matrices take the place of the backbone's, low-rank ones stand beside."""
        return self.placement in AROUND_WEIGHTS and ExpertSlices.mergeable

    def card_fields(self) -> list[str]:
        """See `MoeConfig.card_fields`."""
        low_rank = ["r", "lora_alpha", "use_rslora"] if self.expert_adapter == "lora" else []
        return ["expert_adapter", "experts", *low_rank, "train_shared_experts", "train_router", "modules_to_save"]

    def summary(self) -> str:
        """See `MoeConfig.summary`."""
        count = sum(len(ids) for ids in (self.experts or {}).values())
        kind = "whole matrices" if self.expert_adapter == "full" else f"low-rank experts of rank {self.r}"
        return f"{kind} of {count} experts of the backbone"

    def build(self, place: Place) -> RoutedParts:
        """Build the parts of one layer; see `MoeConfig.build`."""
        assert place.base is not None and place.num_experts is not None and self.experts is not None
        selection = Selection(self.experts[str(place.layer_index)], place.num_experts)
        if self.expert_adapter == "lora":
            return RoutedParts(experts=build_experts(self, place, len(selection)), selection=selection)
        if local_experts(place.base) is not None:
            with torch.device("meta"):  # each process copies its own part
                planned = ExpertSlices(expert_tensors(place.base, place.num_experts), selection.ids)
            return RoutedParts(experts=planned, selection=selection)
        with gathered(place.base), onloaded(place.base):
            slices = ExpertSlices(expert_tensors(place.base, place.num_experts), selection.ids)
        return RoutedParts(experts=slices, selection=selection)


def _refuse_quantized(name: str, module: nn.Module) -> None:
    """Refuse to train a module whose weights hold packed values."""
    if any(hasattr(weight, "quant_state") or weight.element_size() == 1 for weight in module.parameters()):
        raise ValueError(
            f"{name} ({type(module).__name__}) is quantized, so it cannot be trained. Leave train_shared_experts and "
            "train_router off, or load the base model with "
            f"llm_int8_skip_modules=['lm_head', '.*{name.rpartition('.')[2]}']."
        )


def _refuse_split(name: str, experts: nn.Module) -> None:
    """Refuse experts of which this process holds a part only, where the copies cannot be split like them."""
    if is_split_alone(experts):
        raise ValueError(
            f"The experts of {name} are split over processes, so their slices cannot be copied here. "
            f"{SPLIT_LIKE_EXPERTS} Or set expert_adapter='lora', whose experts are whole on every process; or load "
            "the model without distributed_config, and add the adapter before sharding with FSDP2."
        )


class EsftModel(RoutedTuner):
    """Tuner of ESFT adapters."""

    prefix: str = "esft_"


register(EsftConfig, EsftModel)
