"""Mix data sets by how differently they use the experts (Zhu et al., arXiv 2406.11256).

    delta_i = mean_j (1 - cos(v_i, v_j)),     w_i ~ exp(log w_i + eta delta_i),     w_i <- (1 - c) w_i + c / n

v_i is the load of the experts on data set i, all places one after the other. Data that use experts of their own are
drawn more often; c keeps all of them in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..messages import shown
from .checks import check_finite, is_real, listed_batches
from .report.measure import measure_routing
from .report.observe import Batch

ETA, SMOOTHING = 10.0, 0.05
LEAST, MOST = 1e-30, 1e30  # of weights at the start, so that their sum is a number


def next_weights(
    weights: Sequence[float], loads_NE: torch.Tensor, eta: float = ETA, smoothing: float = SMOOTHING
) -> list[float]:
    """The rule itself.

    Args:
        weights: n sampling weights, positive, that sum to one.
        loads_NE: (n, E) load of the experts on each data set.
        eta: Size of the step; the paper's 10.
        smoothing: c, the share that is drawn evenly; the paper's 0.05.

    Returns:
        n weights that sum to one.

    Raises:
        ValueError: A load is not finite.
    """
    check_finite(loads_NE, "The loads of the experts", "The routing that was measured is broken.")
    unit_NE = F.normalize(loads_NE.double(), dim=-1)
    apart_N = (1 - unit_NE @ unit_NE.T).mean(-1)
    mixed_N = (torch.tensor(weights, dtype=torch.float64).log() + eta * apart_N).softmax(0)
    return ((1 - smoothing) * mixed_N + smoothing / len(weights)).tolist()


class MixedData(IterableDataset):
    """Rows of several data sets without end, each from one that is drawn by the current weights.

    A trainer of it needs `max_steps`, and `dataloader_num_workers=0`, so that new weights reach what draws.

    Args:
        datasets: Name -> rows, by their numbers.
        weights: Name -> weight at the start; None draws evenly.
        seed: Of the draws.

    Attributes:
        weights: Name -> weight, which may be changed at any time.

    Raises:
        ValueError: There are fewer than two data sets, one is empty, or a weight is missing or not positive.
    """

    def __init__(
        self, datasets: Mapping[str, Sequence[Any]], weights: Mapping[str, float] | None = None, seed: int = 0
    ) -> None:
        if not isinstance(datasets, Mapping) or len(datasets) < 2:
            raise ValueError(f"MixedData: datasets={shown(datasets)} must be a dict of two data sets or more.")
        if type(seed) is not int or not 0 <= seed < 2**63:
            raise ValueError(f"MixedData: seed={shown(seed)} must be a whole number from 0.")
        unsized = [name for name, rows in datasets.items() if not hasattr(rows, "__len__")]
        if unsized:
            raise ValueError(
                f"MixedData: the data set {shown(unsized[0])} has no length, so that its rows cannot be drawn. Give "
                "rows by their numbers, as a list or a datasets.Dataset."
            )
        empty = [name for name, rows in datasets.items() if len(rows) == 0]
        if empty:
            raise ValueError(f"MixedData: the data set {shown(empty[0])} has no rows. Take it out.")
        given = dict.fromkeys(datasets, 1.0) if weights is None else weights
        known = isinstance(given, Mapping) and set(given) == set(datasets)
        if not known or not all(is_real(own, LEAST, MOST) for own in given.values()):
            raise ValueError(
                f"MixedData: weights={shown(weights)} must have a positive number for each of "
                f"{shown(list(datasets))}, from {LEAST:g} to {MOST:g}."
            )
        self.datasets, self.seed = dict(datasets), seed
        total = sum(given.values())
        self.weights = {name: given[name] / total for name in self.datasets}

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(self.seed)
        names = list(self.datasets)
        while True:
            own = torch.tensor([self.weights[name] for name in names], dtype=torch.float64)
            rows = self.datasets[names[int(torch.multinomial(own, 1, generator=generator))]]
            yield rows[int(torch.randint(len(rows), (1,), generator=generator))]


class DynamicMixing(TrainerCallback):
    """Measures at every evaluation how each data set uses the experts, and sets the weights of what draws.

    Every process measures the same batches, so that all draw alike.

    Args:
        data: What the trainer trains on.
        batches: Name of a data set -> batches of some of its rows, as dicts of tensors.
        eta: See `next_weights`.
        smoothing: See `next_weights`.
        steps: Measure after every so many optimizer steps too; 0 at evaluations alone.

    Attributes:
        history: Step -> weights by name.

    Raises:
        ValueError: The batches are of other data sets, or a number cannot work.
    """

    def __init__(
        self,
        data: MixedData,
        batches: Mapping[str, Sequence[Batch]],
        *,
        eta: float = ETA,
        smoothing: float = SMOOTHING,
        steps: int = 0,
    ) -> None:
        if not isinstance(data, MixedData):
            raise ValueError(f"DynamicMixing: data={shown(data)} must be the MixedData that the trainer trains on.")
        if not isinstance(batches, Mapping):
            raise ValueError(f"DynamicMixing: batches={shown(batches)} must be a dict from data sets to batches.")
        batches = {name: listed_batches(own, f"DynamicMixing: {shown(name)}") for name, own in batches.items()}
        if set(batches) != set(data.datasets):
            raise ValueError(
                f"DynamicMixing: batches has {shown(sorted(map(str, batches)))}, but the data are "
                f"{shown(sorted(data.datasets))}. Give some batches of each."
            )
        if isinstance(eta, bool) or not isinstance(eta, (int, float)) or not 0 <= eta < math.inf:
            raise ValueError(f"DynamicMixing: eta={shown(eta)} must be a number from 0, such as 10.")
        if isinstance(smoothing, bool) or not isinstance(smoothing, (int, float)) or not 0 <= smoothing <= 1:
            raise ValueError(
                f"DynamicMixing: smoothing={shown(smoothing)} must be a number from 0 to 1, such as 0.05."
            )
        if type(steps) is not int or steps < 0:
            raise ValueError(f"DynamicMixing: steps={shown(steps)} must be a whole number from 0.")
        self.data, self.batches = data, dict(batches)
        self.eta, self.smoothing, self.steps = eta, smoothing, steps
        self.history: dict[int, dict[str, float]] = {}

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the weights anew."""
        self.update(kwargs["model"], state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the weights anew where it is due."""
        if self.steps and state.global_step % self.steps == 0:
            self.update(kwargs["model"], state.global_step)

    def update(self, model: Any, step: int) -> dict[str, float]:
        """Measure, and set the weights.

        Args:
            model: The model that is trained.
            step: Optimizer steps so far.

        Returns:
            The weights by name.
        """
        names = list(self.data.datasets)
        places = measure_routing(model, {name: self.batches[name] for name in names})
        loads = [torch.cat([_load(place, name) for place in places]) for name in names]
        weights = next_weights([self.data.weights[n] for n in names], torch.stack(loads), self.eta, self.smoothing)
        self.data.weights = dict(zip(names, weights, strict=True))
        self.history[step] = self.data.weights
        return self.data.weights


def _load(place: Any, group: str) -> torch.Tensor:
    """Load of the experts; their importance where every token uses all of them."""
    own = place.statistics(group)
    if own is None:
        return torch.zeros(place.num_experts, dtype=torch.float64)
    return own.importance if place.dense else own.load
