"""Elastic weight consolidation: what an earlier task needs stays near where it was (EWC, arXiv 1612.00796).

    penalty = weight / 2 sum_i F_i (theta_i - theta*_i)^2,   F_i = mean over batches of the squared gradient

over the trained parameters of the adapters, theta* being their values when F was measured. Kirkpatrick et al. take the
gradient of one sample at a time; batches of one do so here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..layers import routed_layers
from ..messages import shown
from .checks import is_number


@dataclass(frozen=True)
class Fisher:
    """What an earlier task needs of the adapters.

    Attributes:
        importance: Name of a parameter -> F of its elements, float32.
        values: Name of a parameter -> theta*, float32.
    """

    importance: Mapping[str, torch.Tensor]
    values: Mapping[str, torch.Tensor]

    def __post_init__(self) -> None:
        """Check both.

        Raises:
            ValueError: They are of other parameters, a number is not finite, or an importance is negative.
        """
        if not all(isinstance(own, Mapping) for own in self._both()):
            raise ValueError("Fisher: importance and values must be dicts from parameters to tensors.")
        shapes = [{name: getattr(own, "shape", None) for name, own in kind.items()} for kind in self._both()]
        if shapes[0] != shapes[1] or None in shapes[0].values():
            differing = sorted(n for n in shapes[0].keys() | shapes[1].keys() if shapes[0].get(n) != shapes[1].get(n))
            raise ValueError(
                f"Fisher: importance and values must be tensors of the same parameters; {shown(differing)} differ. "
                "Measure again with fisher_information."
            )
        for kind, tensors in zip(("importance", "values"), self._both(), strict=True):
            wrong = [
                name
                for name, own in tensors.items()
                if not bool(torch.isfinite(own).all()) or (kind == "importance" and bool((own < 0).any()))
            ]
            if wrong:
                what = "NaN, infinite or negative" if kind == "importance" else "NaN or infinite"
                raise ValueError(
                    f"Fisher: {kind} holds {what} numbers of {shown(wrong)}, with which a step loses the weights. "
                    "Measure again with fisher_information, on an adapter and batches without such values."
                )

    def _both(self) -> tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]:
        return self.importance, self.values

    def save(self, path: str | Path) -> None:
        """Write both into a safetensors file.

        Args:
            path: The file, beside the adapter's as "fisher.safetensors".
        """
        tensors = {f"importance.{name}": tensor.contiguous() for name, tensor in self.importance.items()}
        save_file(tensors | {f"values.{name}": t.contiguous() for name, t in self.values.items()}, str(path))

    @classmethod
    def load(cls, path: str | Path) -> Fisher:
        """Read a file that `save` has written.

        Args:
            path: The file.

        Raises:
            ValueError: It is another file, or a number in it is not finite.
        """
        try:
            tensors = load_file(str(path))
        except SafetensorError as error:
            raise ValueError(f"{shown(str(path))} is no file of Fisher.save, or damaged ({error}).") from error
        kinds = ("importance.", "values.")
        if not all(name.startswith(kinds) for name in tensors):
            raise ValueError(f"{shown(str(path))} is no file of Fisher.save: it has tensors of other names.")
        importance, values = (
            {name.removeprefix(kind): tensor for name, tensor in tensors.items() if name.startswith(kind)}
            for kind in kinds
        )
        return cls(importance, values)


def fisher_information(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Fisher:
    """Measure what a task needs, after training on it.

    Args:
        model: A model with routed adapters that train, on its device; gradients, mode and weights stay as they are.
        batches: Keyword arguments of the model with labels, on the model's device; one sample each for the definition.

    Returns:
        Importance and values of all trained parameters of the adapters.

    Raises:
        ValueError: There is no such parameter, no batch, a batch without a loss, or one whose loss or gradient is
            not finite.
    """
    parameters = _trained(model)
    if not parameters:
        raise ValueError(f"fisher_information: {type(model).__name__} has no routed adapter that trains.")
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    was_training, count = model.training, 0
    model.eval()
    try:
        for batch in batches:
            loss = model(**batch).loss
            if loss is None:
                raise ValueError("fisher_information: a batch without labels gives no loss; add `labels` to it.")
            if not bool(torch.isfinite(loss.detach()).all()):
                raise ValueError(
                    f"fisher_information: the loss of batch {count} is {float(loss):g}: its labels are all masked, or "
                    "weights of the model or its adapter are broken."
                )
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for total, gradient in zip(sums.values(), gradients, strict=True):
                if gradient is not None:
                    total += gradient.float().square()
            count += 1
    finally:
        model.train(was_training)
    if not count:
        raise ValueError("fisher_information: batches is empty; give at least one.")
    values = {name: p.detach().float().clone() for name, p in parameters.items()}
    return Fisher({name: total / count for name, total in sums.items()}, values)


class EwcCallback(TrainerCallback):
    """Adds the gradient of the penalty before each optimizer step, after gradients have been clipped.

    Args:
        fisher: Of the earlier task, see `fisher_information`.
        weight: Factor of the penalty.

    Raises:
        ValueError: The weight is no positive number, or `fisher` none.
    """

    def __init__(self, fisher: Fisher, weight: float) -> None:
        if not isinstance(fisher, Fisher):
            raise ValueError(f"EwcCallback: fisher={shown(fisher)} must be what fisher_information returns.")
        if not is_number(weight) or not weight > 0:
            raise ValueError(f"EwcCallback: weight={shown(weight)} must be a positive number.")
        self.fisher, self.weight = fisher, float(weight)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the adapters are those that were measured.

        Raises:
            ValueError: They have other parameters, or gradients are not whole when the optimizer steps.
        """
        for name in ("deepspeed", "fsdp", "fp16"):
            if getattr(args, name, None):
                raise ValueError(
                    f"EwcCallback: with {name}={shown(getattr(args, name))} gradients are sharded or scaled when the "
                    "optimizer steps. Train with one process or DDP, in bf16 or float32."
                )
        own = {name: tuple(p.shape) for name, p in _trained(kwargs["model"]).items()}
        known = {name: tuple(values.shape) for name, values in self.fisher.values.items()}
        if own != known:
            differing = sorted(name for name in own.keys() | known.keys() if own.get(name) != known.get(name))
            raise ValueError(
                f"EwcCallback: the adapters' trained parameters are not those that were measured: {shown(differing)} "
                "differ. Measure again with fisher_information, or load the adapter that was measured."
            )

    def penalty(self, model: nn.Module) -> torch.Tensor:
        """The 0-d penalty of the adapters as they are, with its gradient."""
        terms = [
            (
                self.fisher.importance[name].to(p.device) * (p.float() - self.fisher.values[name].to(p.device)) ** 2
            ).sum()
            for name, p in _trained(model).items()
        ]
        return self.weight / 2 * torch.stack(terms).sum()

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the gradient of the penalty to those of the step."""
        for name, p in _trained(kwargs["model"]).items():
            importance, values = (own[name].to(p.device) for own in (self.fisher.importance, self.fisher.values))
            pull = (self.weight * importance * (p.float() - values)).to(p.dtype)
            p.grad = pull if p.grad is None else p.grad + pull


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' trained parameters, by place, kind, adapter and name."""
    found = {}
    for layer in routed_layers(model):
        for kind, banks in (("experts", layer.experts), ("router", layer.router)):
            for adapter, part in banks.items():
                for name, parameter in part.named_parameters():
                    if parameter.requires_grad:
                        found[f"{layer.place}.{kind}.{adapter}.{name}"] = parameter
    return found
