"""Fields that name some of a backbone's own experts, layer by layer, as a selection for a task does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config.config import MoeConfig
from ..place import MoeLayer
from ..selection.files import wrong_experts


@dataclass
class SelectedExpertsConfig(MoeConfig):
    """Fields of adapters on a backbone's own experts."""

    experts: dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "help": "Experts to train, by decoder layer: {'1': [8, 26], '2': [5]}, as select_experts writes it. "
            "Layers that are left out stay as they are."
        },
    )
    num_backbone_experts: int | None = field(
        default=None,
        metadata={"help": "Experts of the backbone at each of these layers; filled in, and checked on loading."},
    )

    def __post_init__(self) -> None:
        if self.experts is not None:
            self.experts = self._normalised(self.experts)
        super().__post_init__()

    def _normalised(self, experts: Mapping[Any, Any]) -> dict[str, list[int]]:
        """Layers as strings and ids in ascending order, whichever form they were written in."""
        self._check(
            isinstance(experts, Mapping),
            "experts",
            "a dict from layer index to expert ids: `selection.experts`, where the selection is what "
            "moe_peft.select_experts returns, or moe_peft.ExpertSelection.load(path) of a file",
        )
        reason = wrong_experts(experts)
        hint = f"a dict from layer index to expert ids, as the entry 'experts' of a selection's file: {reason}"
        self._check(reason is None, "experts", hint)
        return {str(int(layer)): sorted(ids) for layer, ids in experts.items()}

    def selected_layers(self, layers: Sequence[MoeLayer]) -> list[MoeLayer]:
        """The layers of a model that have selected experts, after the selection has been checked against it.

        Args:
            layers: All sparse layers of the model.

        Raises:
            ValueError: Nothing is selected, a layer or an expert does not exist, or the model is not the one that the
                experts were selected in.
        """
        selected = {int(layer): ids for layer, ids in (self.experts or {}).items() if ids}
        sizes = {layer.index: layer.num_experts for layer in layers}
        last = {layer.index: layer.experts for layer in layers}
        double = next((layer for layer in layers if last[layer.index] != layer.experts), None)
        if double is not None:
            raise ValueError(
                f"{type(self).__name__}: {double.experts} and {last[double.index]} both belong to layer "
                f"{double.index}, so `experts` cannot tell them apart. Adapt the part of the model with one of them."
            )
        self._check(
            bool(selected),
            "experts",
            "a selection, as {'1': [8, 26]}: score the experts on samples of the task with moe_peft.score_experts and "
            "choose with select_experts, or run train/select_experts.py",
        )
        for layer, ids in selected.items():
            self._check(layer in sizes, "experts", f"of layers with experts, {sorted(sizes)}; layer {layer} has none")
            self._check(
                ids[-1] < sizes[layer], "experts", f"below {sizes[layer]} in layer {layer}, which {ids[-1]} is not"
            )
        self._check_size({sizes[layer] for layer in selected})
        return [layer for layer in layers if layer.index in selected]

    def _check_size(self, sizes: set[int]) -> None:
        """Refuse a model whose layers have other numbers of experts than where the experts were selected."""
        if self.num_backbone_experts is None:
            self.num_backbone_experts = sizes.pop() if len(sizes) == 1 else None
            return
        self._check(
            sizes == {self.num_backbone_experts},
            "num_backbone_experts",
            f"the model's, {sorted(sizes)}: the experts were selected in another model, and an id means another "
            "expert here. Load the adapter on the model it was trained on",
        )

    def adapts(self, layer: MoeLayer) -> bool:
        """Layers without a selected expert stay as they are."""
        return bool((self.experts or {}).get(str(layer.index)))
