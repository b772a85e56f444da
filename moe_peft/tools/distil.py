"""A routed adapter as one LoRA, approximately, with what it loses measured: for engines that need a LoRA.

    B A = sum_e w_e B_e A_e truncated to a rank,   w_e = mean weight of expert e over the tokens of the batches

is the start, found by QR of the factors; then the LoRA learns the routed model's next tokens,
    loss = mean over tokens of KL(routed || LoRA)
which is no identity: the error is a part of the file's card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F

from .. import telemetry
from ..files import check_free, new_folder, write_text
from ..layers import RoutedLayer
from ..messages import shown
from ..telemetry.statistics import RoutingStatistics
from .checks import check_finite_adapter, check_peft_model, is_real
from .measure import Batch, Comparison, Difference, checked_batches, evaluating, labels_of, next_tokens
from .other_experts import deciding_places, only, routed_by_name
from .truncate import truncated

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Distilled:
    """What was written.

    Attributes:
        rank: Of the LoRA.
        lost: Place -> share of the mean change's norm that the truncation lost.
        start: What the truncated mean loses against the routed adapter.
        difference: What the LoRA that was written loses.
    """

    rank: int
    lost: dict[str, float]
    start: Difference
    difference: Difference

    def __str__(self) -> str:
        """One line."""
        return f"rank {self.rank}: {self.difference} (before training: {self.start})"


def distil_to_lora(
    model: PeftModel,
    folder: str | Path,
    batches: Iterable[Batch],
    *,
    fresh_base: Callable[[], nn.Module],
    rank: int | None = None,
    max_lost: float = 0.1,
    steps: int = 0,
    learning_rate: float = 1e-3,
    held_out: Iterable[Batch] | None = None,
    adapter_name: str = "default",
) -> Distilled:
    """Write one stock LoRA that comes near a routed adapter of linear layers, and measure how near.

    Args:
        model: A causal language model with the adapter, which is not changed.
        folder: The folder to make.
        batches: Texts like those that it will serve: keyword arguments of the model.
        fresh_base: Makes the base model anew, for the LoRA to be put on, as
            `lambda: AutoModelForCausalLM.from_pretrained(name)`.
        rank: Of the LoRA; None takes the smallest with which no place loses more than `max_lost`.
        max_lost: Share of a place's mean change that may be lost, where no rank is given.
        steps: Optimizer steps of distillation; 0 writes the truncated mean.
        learning_rate: Of AdamW in them.
        held_out: Other texts to measure on; None takes the batches themselves.
        adapter_name: Which adapter.

    Returns:
        The measured error, which the folder's card holds as well.

    Raises:
        ValueError: There is no such adapter, it is not around linear layers alone, or a number cannot work;
            nothing has been written.
    """
    check_free(folder)
    check_peft_model(model, "distil_to_lora")
    layers = routed_by_name(model, adapter_name)
    check_finite_adapter(model, adapter_name, "distil_to_lora")
    data = checked_batches(batches, "distil_to_lora")
    measured_on = data if held_out is None else checked_batches(held_out, "distil_to_lora")
    _check(layers, adapter_name, rank, max_lost, steps)
    _check_training(fresh_base, learning_rate)
    own: Any = model.peft_config[adapter_name]
    with only(model, adapter_name):
        means, deciding = _mean_weights(model, data), deciding_places(layers, adapter_name)
        factors = {
            name: layer.experts[adapter_name].delta_factors(means[deciding[name]].float())
            for name, layer in layers.items()
        }
        pairs, lost = _truncated(factors, rank, max_lost)
        student = _student(fresh_base(), own, pairs)
        start = _difference(model, student, measured_on)
        difference = start
        if steps:
            _train(model, student, data, steps, learning_rate)
            difference = _difference(model, student, measured_on)
    result = Distilled(max(len(A) for A, _ in pairs.values()), lost, start, difference)
    with new_folder(folder) as growing:
        student.save_pretrained(str(growing))
        write_text(growing / "README.md", _card(own, result))
    return result


def _check(layers: dict[str, RoutedLayer], adapter_name: str, rank: int | None, max_lost: float, steps: int) -> None:
    other = next((own for own in layers.values() if not hasattr(own, "get_delta_factors")), None)
    nonlinear = next((own for own in layers.values() if not own.experts[adapter_name].mergeable), None)
    if other is not None or nonlinear is not None:
        found = other or nonlinear
        assert found is not None
        raise ValueError(
            f"distil_to_lora: the adapter at {found.place} ({type(found).__name__}) is no sum of matrices beside a "
            "linear layer, so no LoRA there comes near it. Keep it as an adapter, or train a LoRA on its answers."
        )
    for name, value in (("rank", rank), ("steps", steps)):
        least = 1 if name == "rank" else 0
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"distil_to_lora: {name}={shown(value)} must be a whole number, {least} or more.")
    if not is_real(max_lost, 0, 1) or max_lost == 1:
        raise ValueError(f"distil_to_lora: max_lost={shown(max_lost)} must be a share from 0 to 1, such as 0.1.")


def _check_training(fresh_base: Any, learning_rate: Any) -> None:
    if not callable(fresh_base):
        raise TypeError(
            f"distil_to_lora: fresh_base={shown(fresh_base)} must be a function that makes the base model anew, as "
            "lambda: AutoModelForCausalLM.from_pretrained(name)."
        )
    if not is_real(learning_rate, 0, 1e6) or learning_rate == 0:
        raise ValueError(f"distil_to_lora: learning_rate={shown(learning_rate)} must be a positive number.")


def _mean_weights(model: nn.Module, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """By place the (E,) mean weight of each expert over the valid tokens."""
    mass, tokens = dict[str, torch.Tensor](), dict[str, float]()
    with evaluating(model), telemetry.record(model) as routings:
        for batch in batches:
            next_tokens(model, batch)
    for place, made in routings.items():
        for routing in made:
            own = RoutingStatistics.of(routing)
            mass[place] = mass.get(place, torch.zeros(len(own.mass), dtype=torch.float64)) + own.mass.double().cpu()
            tokens[place] = tokens.get(place, 0.0) + float(own.tokens)
    return {place: own / max(tokens[place], 1.0) for place, own in mass.items()}


@torch.no_grad()
def _truncated(factors: Pairs, rank: int | None, max_lost: float) -> tuple[Pairs, dict[str, float]]:
    """The pairs of one rank, and what each place loses; the smallest rank with which none loses too much."""
    if rank is None:
        rank = 1
        while any(truncated(A, B, rank)[2] > max_lost for A, B in factors.values()):
            rank += 1
    pairs, lost = {}, {}
    for name, (A, B) in factors.items():
        own_A, own_B, lost[name] = truncated(A, B, rank)
        # A place with a product of a smaller rank is filled up, so that one rank serves all.
        missing = rank - len(own_A)
        pairs[name] = (F.pad(own_A, (0, 0, 0, missing)), F.pad(own_B, (0, missing)))
    return pairs, lost


@torch.no_grad()
def _student(base: nn.Module, own: Any, pairs: Pairs) -> PeftModel:
    rank = len(next(iter(pairs.values()))[0])
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(pairs),
        task_type=own.task_type,
        base_model_name_or_path=own.base_model_name_or_path,
    )
    student = get_peft_model(base, config)
    assert isinstance(student, PeftModel)
    for name, (A, B) in pairs.items():
        layer: Any = student.get_base_model().get_submodule(name)
        layer.lora_A["default"].weight.copy_(A)
        layer.lora_B["default"].weight.copy_(B)
    return student


def _difference(model: nn.Module, student: nn.Module, batches: list[Batch]) -> Difference:
    comparison = Comparison()
    with evaluating(model), evaluating(student):
        for batch in batches:
            before, labels = next_tokens(model, batch)
            comparison.add(before, next_tokens(student, batch)[0], labels)
    return comparison.result()


def _train(model: nn.Module, student: nn.Module, batches: list[Batch], steps: int, learning_rate: float) -> None:
    """Distillation on the next tokens of the routed model."""
    optimizer = torch.optim.AdamW([own for own in student.parameters() if own.requires_grad], lr=learning_rate)
    with evaluating(model), evaluating(student):
        for step in range(steps):
            batch = batches[step % len(batches)]
            wanted, _ = next_tokens(model, batch)
            given = {key: value for key, value in batch.items() if key != "labels"}
            keep = labels_of(batch)[:, 1:] != -100
            found = F.log_softmax(student(**given).logits[:, :-1].float()[keep], dim=-1)
            F.kl_div(found, wanted, reduction="batchmean", log_target=True).backward()
            optimizer.step()
            optimizer.zero_grad()


def _card(own: Any, result: Distilled) -> str:
    rows = [f"| {name.replace('_', ' ')} | {value:.4g} |" for name, value in result.difference.metrics().items()]
    source = own.summary()
    return "\n".join(
        [
            "---\nlibrary_name: peft\ntags: [moe-peft, distilled]\n---\n",
            f"# A LoRA of rank {result.rank}, distilled from a routed adapter\n",
            f"It stands for {own.method} ({source}), whose weights depend on the token, and comes near it:\n",
            "| measured against the routed adapter | |\n|---|---|",
            *rows,
            f"| largest share of a place's mean change that the rank lost | {max(result.lost.values()):.4g} |\n",
        ]
    )
