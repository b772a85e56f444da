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

CRITERIA = ("token", "gate")
AGGREGATES = ("token", "sample")
# Keys of the file; the first two are the authors', the others are ours.
KEYS = {
    ("token", "token"): "token_scores",
    ("gate", "token"): "gate_scores",
    ("token", "sample"): "sample_token_scores",
    ("gate", "sample"): "sample_gate_scores",
}


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
        if not self.by_layer:
            raise ValueError("Expert scores of no layer: there is nothing to select from.")
        kinds = set.union(*(set(own.values) for own in self.by_layer.values()))
        for layer, own in self.by_layer.items():
            if set(own.values) != kinds or len({scores_E.numel() for scores_E in own.values.values()}) != 1:
                found = {kind: scores_E.numel() for kind, scores_E in own.values.items()}
                raise ValueError(
                    f"Layer {layer} has the scores {found} (criterion and aggregate: experts). Every layer needs the "
                    f"same ones, {sorted(kinds)}, with one number per expert."
                )
            for kind, scores_E in own.values.items():
                if not bool((torch.isfinite(scores_E) & (scores_E >= 0)).all()):
                    raise ValueError(
                        f"The {kind[0]} scores of layer {layer} are {scores_E.tolist()}; a score is zero or "
                        "positive. Score the experts again with moe_peft.score_experts."
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
            raise ValueError(f"criterion={criterion!r} must be one of {CRITERIA}.")
        if aggregate not in AGGREGATES:
            raise ValueError(f"aggregate={aggregate!r} must be one of {AGGREGATES}.")
        if layer not in self.by_layer:
            raise ValueError(f"layer={layer} has no experts; the layers with scores are {self.layers}.")
        values = self.by_layer[layer].values
        if (criterion, aggregate) not in values:
            raise ValueError(
                f"aggregate={aggregate!r}: these scores hold the mean over all tokens alone, as the authors' files "
                "do. Use aggregate='token', or score the samples again with moe_peft.score_experts."
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
        Path(path).write_text(json.dumps(content) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> ExpertScores:
        """Read what `save` wrote, or the authors' `summary.json`.

        Args:
            path: The file.

        Raises:
            ValueError: The file has another form.
        """
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        needed = ("token_scores", "gate_scores")
        missing = [key for key in needed if not isinstance(content, dict) or not content.get(key)]
        if missing:
            raise ValueError(
                f"{path} has no {missing}. Expert scores are {{'token_scores': {{'1': {{'0': 0.01, ...}}}}, "
                "'gate_scores': ...}, as ExpertScores.save writes them."
            )
        by_layer = {
            layer: LayerScores(
                {
                    kind: _vector(content[key][str(layer)], f"{path}, {key}, layer {layer}")
                    for kind, key in KEYS.items()
                    if str(layer) in content.get(key, {})
                },
                content.get("top_k", {}).get(str(layer)),
                content.get("expert_parameters", {}).get(str(layer)),
            )
            for layer in sorted(int(name) for name in content["token_scores"])
        }
        facts = {name: content.get(name) for name in ("num_tokens", "num_samples", "model_parameters")}
        return cls(by_layer, **facts)


def _numbered(scores_E: torch.Tensor) -> dict[str, float]:
    return {str(expert): score for expert, score in enumerate(scores_E.tolist())}


def _vector(scores: dict[str, float], where: str) -> torch.Tensor:
    numbers = isinstance(scores, dict) and all(type(score) in (int, float) for score in scores.values())
    if not numbers or sorted(map(int, scores)) != list(range(len(scores))):
        raise ValueError(f"{where}: the experts must be numbered from 0 to {len(scores) - 1}, each with a score.")
    return torch.tensor([scores[str(expert)] for expert in range(len(scores))], dtype=torch.float64)
