"""How much a task uses each expert of a backbone, by two criteria.

    gate:    g_i = mean_j (1 / L_j) sum_t w_ti               token:    r_i = mean_j (1 / L_j) sum_t [w_ti > 0] / K

where w_ti is the combine weight of expert i for token t of sample j with L_j tokens, zero where the token does not use
it (Wang et al., 2024, arXiv 2407.01906, section 3). The aggregate "sample" is this mean over samples; the default,
"token", takes the mean over all tokens at once, as the scores that the authors published do. Both are the same for
samples of equal length.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..files import write_text
from ..messages import shown
from .files import layer_index, read_object

CRITERIA = ("token", "gate")
AGGREGATES = ("token", "sample")
# Keys of the file; the first two are the authors', the others are ours.
KEYS = {
    ("token", "token"): "token_scores",
    ("gate", "token"): "gate_scores",
    ("token", "sample"): "sample_token_scores",
    ("gate", "sample"): "sample_gate_scores",
}


# Scores are means of shares or weights; what is larger is a slip, and has no decimals to be compared by.
MAX_SCORE = 1e30


FORM = (
    "Expert scores are {'token_scores': {'1': {'0': 0.01, ...}}, 'gate_scores': ...}, as ExpertScores.save writes them"
)


@dataclass(frozen=True)
class LayerScores:
    """Scores of one sparse layer.

    Attributes:
        values: (criterion, aggregate) -> (E,) float64 scores.
        top_k: Experts a token uses; None where a file does not tell.
        expert_parameters: Parameters of one expert; None where a file does not tell.
    """

    values: dict[tuple[str, str], torch.Tensor]
    top_k: int | None = None
    expert_parameters: int | None = None


@dataclass(frozen=True)
class ExpertScores:
    """Scores of all experts of a backbone on the samples of a task.

    Attributes:
        by_layer: Index of the decoder layer -> its scores, in the model's order.
        num_tokens: Tokens that were scored; None where a file does not tell.
        num_samples: Rows or packed documents they came from; None where a file does not tell.
        model_parameters: Parameters of the backbone; None where a file does not tell.
    """

    by_layer: dict[int, LayerScores]
    num_tokens: int | None = None
    num_samples: int | None = None
    model_parameters: int | None = None

    def __post_init__(self) -> None:
        known = isinstance(self.by_layer, dict) and all(isinstance(own, LayerScores) for own in self.by_layer.values())
        if not known or any(layer_index(layer) != layer for layer in self.by_layer):
            raise ValueError(f"by_layer={shown(self.by_layer)} must be a dict from layer indices to LayerScores.")
        if not self.by_layer:
            raise ValueError("Expert scores of no layer: there is nothing to select from.")
        for layer, own in self.by_layer.items():
            _check_vectors(layer, own)
        kinds = set.union(*(set(own.values) for own in self.by_layer.values()))
        for layer, own in self.by_layer.items():
            if set(own.values) != kinds or len({scores_E.numel() for scores_E in own.values.values()}) != 1:
                found = {kind: scores_E.numel() for kind, scores_E in own.values.items()}
                raise ValueError(
                    f"Layer {layer} has the scores {found} (criterion and aggregate: experts). Every layer needs the "
                    f"same ones, {sorted(kinds)}, with one number per expert."
                )
            for kind, scores_E in own.values.items():
                wrong_E = ~((scores_E >= 0) & (scores_E <= MAX_SCORE))  # NaN is neither
                if bool(wrong_E.any()):
                    expert = int(wrong_E.long().argmax())
                    raise ValueError(
                        f"The {kind[0]} scores of layer {layer} have {float(scores_E[expert]):g} for expert {expert}; "
                        f"a score is zero or a positive number up to {MAX_SCORE:g}. Score the experts again with "
                        "moe_peft.score_experts."
                    )

    @property
    def layers(self) -> list[int]:
        """Indices of the decoder layers with experts."""
        return list(self.by_layer)

    @property
    def num_experts(self) -> dict[int, int]:
        """Layer -> E."""
        return {layer: next(iter(own.values.values())).numel() for layer, own in self.by_layer.items()}

    @property
    def top_k(self) -> dict[int, int | None]:
        """Layer -> K, the experts a token uses."""
        return {layer: own.top_k for layer, own in self.by_layer.items()}

    def of(self, layer: int, criterion: str = "token", aggregate: str = "token") -> torch.Tensor:
        """The scores of one layer.

        Args:
            layer: Index of the decoder layer.
            criterion: "token" or "gate".
            aggregate: "token" (mean over all tokens) or "sample" (mean of the samples' means).

        Returns:
            (E,) float64. Token scores sum to one; gate scores to the mean of a token's summed weights, which is one
            only where the backbone rescales them.

        Raises:
            ValueError: There is no such layer or score.
        """
        if criterion not in CRITERIA:
            raise ValueError(f"criterion={shown(criterion)} must be one of {CRITERIA}.")
        if aggregate not in AGGREGATES:
            raise ValueError(f"aggregate={shown(aggregate)} must be one of {AGGREGATES}.")
        if layer_index(layer) != layer or layer not in self.by_layer:
            raise ValueError(f"layer={shown(layer)} has no experts; the layers with scores are {self.layers}.")
        values = self.by_layer[layer].values
        if (criterion, aggregate) not in values:
            raise ValueError(
                f"aggregate={shown(aggregate)}: these scores hold the mean over all tokens alone, as the authors' "
                "files do. Use aggregate='token', or score the samples again with moe_peft.score_experts."
            )
        return values[criterion, aggregate]

    def save(self, path: str | Path) -> None:
        """Write a JSON file that readers of the authors' `summary.json` understand, with full precision.

        Args:
            path: The file; its folder must exist.
        """
        content: dict[str, Any] = {
            key: {str(layer): _numbered(own.values[kind]) for layer, own in self.by_layer.items()}
            for kind, key in KEYS.items()
            if all(kind in own.values for own in self.by_layer.values())
        }
        content["top_k"] = {str(layer): own.top_k for layer, own in self.by_layer.items()}
        content["expert_parameters"] = {str(layer): own.expert_parameters for layer, own in self.by_layer.items()}
        for name in ("num_tokens", "num_samples", "model_parameters"):
            content[name] = getattr(self, name)
        write_text(path, json.dumps(content) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> ExpertScores:
        """Read what `save` wrote, or the authors' `summary.json`.

        Args:
            path: The file.

        Raises:
            ValueError: The file has another form.
        """
        content = read_object(path, f"file of expert scores; {FORM}")
        missing = [key for key in ("token_scores", "gate_scores") if not content.get(key)]
        if missing:
            raise ValueError(f"{path} has no {missing}. {FORM}.")
        numbers = {key: _by_layer(content[key], f"{path}, {key}") for key in KEYS.values() if key in content}
        facts = {key: _by_layer(content.get(key) or {}, f"{path}, {key}") for key in ("top_k", "expert_parameters")}
        layers = sorted({layer for own in numbers.values() for layer in own})
        by_layer = {
            layer: LayerScores(
                {
                    kind: _vector(numbers[key][layer], f"{path}, {key}, layer {layer}")
                    for kind, key in KEYS.items()
                    if layer in numbers.get(key, {})
                },
                *(_count(own.get(layer), f"{path}, {key}, layer {layer}") for key, own in facts.items()),
            )
            for layer in layers
        }
        totals = ("num_tokens", "num_samples", "model_parameters")
        return cls(by_layer, **{name: _count(content.get(name), f"{path}, {name}") for name in totals})


def _check_vectors(layer: int, own: LayerScores) -> None:
    for kind, scores_E in own.values.items() if isinstance(own.values, dict) else [("values", own.values)]:
        if not isinstance(scores_E, torch.Tensor) or scores_E.dim() != 1 or not scores_E.is_floating_point():
            raise ValueError(
                f"The scores {shown(kind)} of layer {layer} are {shown(scores_E)}, and must be a tensor of one "
                "floating point number per expert."
            )


def _numbered(scores_E: torch.Tensor) -> dict[str, float]:
    return {str(expert): score for expert, score in enumerate(scores_E.tolist())}


def _by_layer(entries: object, where: str) -> dict[int, Any]:
    """Entries of a file by layer index."""
    layers = [layer_index(key) for key in entries] if isinstance(entries, dict) else [None]
    if not isinstance(entries, dict) or None in layers or len(set(layers)) < len(layers):
        raise ValueError(f"{where}: {shown(entries)} must be an object with the index of a layer as every key.")
    return dict(zip(layers, entries.values(), strict=True))  # type: ignore[arg-type]


def _vector(scores: object, where: str) -> torch.Tensor:
    """(E,) float64 scores of an object from expert to score."""
    experts = [layer_index(key) for key in scores] if isinstance(scores, dict) else [None]
    if not isinstance(scores, dict) or None in experts or set(experts) != set(range(len(scores))):
        size = len(scores) if isinstance(scores, dict) else 2
        raise ValueError(f"{where}: the experts must be numbered from 0 to {size - 1}, each with a score.")
    for score in scores.values():
        if type(score) not in (int, float) or abs(score) > 1e300:
            raise ValueError(f"{where}: {shown(score)} is no score; a score is zero or a positive number.")
    numbered = dict(zip(experts, scores.values(), strict=True))
    return torch.tensor([float(numbered[expert]) for expert in range(len(scores))], dtype=torch.float64)


def _count(value: object, where: str) -> int | None:
    """A whole number of a file, or None where it does not tell."""
    if value is None or (type(value) is int and 0 < value < 2**63):
        return value
    raise ValueError(f"{where}: {shown(value)} must be a positive whole number, or null.")
