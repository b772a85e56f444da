"""Selected experts of every sparse layer, how they were selected, and their file, in the form of the ESFT authors."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import write_text
from ..messages import shown
from .files import layer_index, read_object, wrong_experts

NON_EXPERT_MODULES = (
    "non_expert_modules=True trains everything besides the experts as well (attention, norms, embeddings, routers), "
    "which an adapter of selected experts does not. Write false there, and name what to train beside the experts in "
    "the adapter's configuration: modules_to_save=['q_proj', 'v_proj'], train_router=True."
)
FORM = (
    "it must hold {'experts': {'1': [8, 26], ...}, 'shared_experts': false, 'non_expert_modules': false}, with layer "
    "indices as keys and lists of different expert ids"
)


@dataclass(frozen=True)
class SelectionRule:
    """How experts were selected; see `select_experts`."""

    p: float
    criterion: str = "token"
    aggregate: str = "token"
    min_experts: int = 0
    normalize_scores: bool = False

    def __str__(self) -> str:
        """One line."""
        parts = [f"{self.criterion} scores, p={self.p:g}"]
        parts += ["of each layer's mass"] if self.normalize_scores else []
        parts += ["mean of sample means"] if self.aggregate == "sample" else []
        parts += [f"at least {self.min_experts} per layer"] if self.min_experts else []
        return ", ".join(parts)


@dataclass(frozen=True)
class ExpertSelection:
    """Selected experts of every sparse layer.

    Attributes:
        experts: Index of the decoder layer, as a string -> experts, highest score first. This is what
            `EsftConfig(experts=...)` takes.
        shared_experts: Whether to train the experts that every token uses as well; `EsftConfig` calls it
            `train_shared_experts`.
        non_expert_modules: Always False, kept for the authors' file format.
        num_experts: Layer -> E; empty where a file does not tell.
        expert_parameters: Layer -> parameters of one expert; empty where unknown.
        model_parameters: Parameters of the backbone; None where unknown.
        rule: How the experts were selected; None where unknown.
    """

    experts: dict[str, list[int]]
    shared_experts: bool = False
    non_expert_modules: bool = False
    num_experts: dict[str, int] = field(default_factory=dict, compare=False)
    expert_parameters: dict[str, int] = field(default_factory=dict, compare=False)
    model_parameters: int | None = field(default=None, compare=False)
    rule: SelectionRule | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.experts, dict) or not all(isinstance(layer, str) for layer in self.experts):
            raise ValueError(f"experts={shown(self.experts)} must be a dict from layers as strings to expert ids.")
        for name in ("num_experts", "expert_parameters"):
            counts = getattr(self, name)
            least = 1 if name == "num_experts" else 0
            if not isinstance(counts, dict) or not all(_counts(*entry, least) for entry in counts.items()):
                raise ValueError(f"{name}={shown(counts)} must be a dict from layers as strings to whole numbers.")
        reason = wrong_experts(self.experts, self.num_experts)
        if reason is not None:
            raise ValueError(f"experts={shown(self.experts)} is no selection: {reason}.")
        for name in ("shared_experts", "non_expert_modules"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={shown(getattr(self, name))} must be True or False.")
        if self.non_expert_modules:
            raise ValueError(NON_EXPERT_MODULES)

    @property
    def counts(self) -> dict[str, int]:
        """Layer -> number of selected experts."""
        return {layer: len(ids) for layer, ids in self.experts.items()}

    @property
    def num_selected(self) -> int:
        """Selected experts of all layers."""
        return sum(self.counts.values())

    @property
    def share(self) -> float | None:
        """Selected experts over all experts; None where the number of experts is unknown."""
        return self.num_selected / sum(self.num_experts.values()) if self.num_experts else None

    @property
    def num_parameters(self) -> int | None:
        """Parameters of the selected experts; None where the size of an expert is unknown."""
        if not self.expert_parameters:
            return None
        return sum(count * self.expert_parameters[layer] for layer, count in self.counts.items())

    def overlap(self, other: ExpertSelection) -> dict[str, float]:
        """Jaccard index of two selections, |both| / |either|, layer by layer.

        Args:
            other: A selection of the same backbone, for another task for instance.

        Returns:
            Layer -> 0 (disjoint) to 1 (the same, or both empty).

        Raises:
            ValueError: `other` is no selection.
        """
        if not isinstance(other, ExpertSelection):
            raise ValueError(f"other={shown(other)} must be an ExpertSelection, as select_experts returns it.")
        layers = sorted(self.experts.keys() | other.experts.keys(), key=int)
        pairs = {layer: (set(self.experts.get(layer, ())), set(other.experts.get(layer, ()))) for layer in layers}
        return {layer: len(a & b) / len(a | b) if a | b else 1.0 for layer, (a, b) in pairs.items()}

    def save(self, path: str | Path) -> None:
        """Write the authors' JSON form: `experts`, `shared_experts` and `non_expert_modules`.

        Where it is known, `num_experts` follows, which their readers pass over: it tells backbones apart.

        Args:
            path: The file; its folder must exist.
        """
        names = ["experts", "shared_experts", "non_expert_modules", *(["num_experts"] if self.num_experts else [])]
        write_text(path, json.dumps({name: getattr(self, name) for name in names}) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> ExpertSelection:
        """Read what `save` wrote, or a configuration of the authors.

        Args:
            path: The file.

        Raises:
            ValueError: The file has another form, or asks for more than experts.
        """
        content = read_object(path, f"selection of experts: {FORM}")
        experts = content.get("experts")
        reason = wrong_experts(experts) if isinstance(experts, dict) else "it has no 'experts'"
        if experts is None or reason is not None:
            raise ValueError(f"{path} is no selection of experts: {FORM}; {reason}.")
        fields: dict[str, Any] = {
            name: content[name] for name in ("shared_experts", "non_expert_modules") if name in content
        }
        if isinstance(content.get("num_experts"), dict):
            fields["num_experts"] = content["num_experts"]
        try:
            return cls({layer: experts[layer] for layer in sorted(experts, key=int)}, **fields)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _counts(layer: object, count: object, least: int) -> bool:
    """Whether an entry says how many of something a layer has."""
    return isinstance(layer, str) and layer_index(layer) is not None and type(count) is int and count >= least
