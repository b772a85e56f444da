"""Which of many LoRAs to compose for a task: good on a few examples of it, and unlike each other.

    cost(j | chosen) = 1 - (L_0 - L_j) / |L_0 - L_best| + diversity * max over chosen i of cos(D_i, D_j)

L_0 is the loss of the base model on the examples and L_j with LoRA j; D_j is all that it adds to the weights. The LoRA
of least loss is chosen first, then the one of least cost, until there are k. Choosing by K examples and by the
similarity of the group is that of Yang et al. (arXiv 2408.15915), in one greedy pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..messages import shown
from .checks import check_module, check_text, check_whole, is_real
from .compose import check_places
from .measure import Batch, checked_batches, evaluating, next_tokens
from .similarity import cosines
from .stock_lora import Pair, StockLora, read_lora


@dataclass(frozen=True)
class ChosenLoras:
    """What was chosen, and why.

    Attributes:
        adapters: Name -> folder of the chosen LoRAs, the first choice first, as `compose` takes them.
        losses: Name of each candidate -> mean loss per token on the examples with it, ascending.
        base_loss: That of the base model.
        names: Names of the candidates in the order of `similarity`.
        similarity: (C, C) float64 cosines of what the candidates add; NaN beside one that adds nothing.
    """

    adapters: dict[str, str]
    losses: dict[str, float]
    base_loss: float
    names: tuple[str, ...]
    similarity: torch.Tensor

    def __str__(self) -> str:
        """One line."""
        own = ", ".join(f"{name} ({self.losses[name]:.4f})" for name in self.adapters)
        return f"{own}; base model {self.base_loss:.4f}"


def choose_loras(
    model: nn.Module,
    candidates: Mapping[str, str],
    examples: Iterable[Batch],
    k: int,
    *,
    diversity: float = 0.5,
) -> ChosenLoras:
    """Choose the LoRAs to compose by a few examples of the task.

    Args:
        model: The base model, a causal language model without adapters; it is left as it is.
        candidates: Name -> folder of a LoRA of stock peft, or its name on the Hub.
        examples: The examples: batches of keyword arguments of the model, with labels where not every token counts.
        k: LoRAs to choose.
        diversity: What likeness to a chosen one costs, in shares of what the best candidate gains; 0 takes the k of
            least loss.

    Returns:
        The chosen ones, with losses and likeness of all.

    Raises:
        TypeError: The model is none, or a name is no text.
        ValueError: There are fewer candidates than k, one is no plain LoRA or does not fit the model, or a number
            cannot work.
    """
    check_module(model, "choose_loras")
    if not isinstance(candidates, Mapping) or not candidates:
        raise ValueError(
            f"choose_loras: candidates={shown(candidates)} must be a dict from names to folders of LoRAs."
        )
    for name in candidates:
        check_text(name, "choose_loras", "a name of candidates")
    check_whole(k, "choose_loras", "k", least=1)
    if k > len(candidates):
        raise ValueError(
            f"choose_loras: k={k} of {len(candidates)} candidates cannot be chosen. Give more, or less k."
        )
    if not is_real(diversity, 0, 1e6):
        raise ValueError(f"choose_loras: diversity={shown(diversity)} must be a number, 0 or more.")
    data = checked_batches(examples, "choose_loras")
    loras = {name: read_lora(str(folder)) for name, folder in candidates.items()}
    check_places(model, list(loras.values()))
    with evaluating(model):
        base_loss = _loss(model, data)
        losses = {}
        for name, lora in loras.items():
            with _acting(model, lora):
                losses[name] = _loss(model, data)
    similarity = cosines(_products(list(loras.values())))
    names = list(loras)
    order = _greedy([losses[name] for name in names], base_loss, similarity, k, diversity)
    return ChosenLoras(
        adapters={names[j]: str(candidates[names[j]]) for j in order},
        losses=dict(sorted(losses.items(), key=lambda item: item[1])),
        base_loss=base_loss,
        names=tuple(names),
        similarity=similarity,
    )


def _greedy(losses: list[float], base_loss: float, similarity: torch.Tensor, k: int, diversity: float) -> list[int]:
    scale = abs(base_loss - min(losses)) or 1.0
    costs = [1 - (base_loss - own) / scale for own in losses]
    alike = similarity.nan_to_num(0.0)
    chosen = [min(range(len(losses)), key=losses.__getitem__)]
    while len(chosen) < k:
        left = [j for j in range(len(losses)) if j not in chosen]
        chosen.append(min(left, key=lambda j: costs[j] + diversity * float(alike[j, chosen].max())))
    return chosen


def _loss(model: nn.Module, batches: list[Batch]) -> float:
    """Mean per token."""
    total, count = 0.0, 0
    for batch in batches:
        said, labels = next_tokens(model, batch)
        total, count = total + float(F.nll_loss(said, labels, reduction="sum").double()), count + len(labels)
    if not count:
        raise ValueError("choose_loras: the examples have no token with a label after the first. Give some texts.")
    return total / count


@contextmanager
def _acting(model: nn.Module, lora: StockLora) -> Iterator[None]:
    """Let a LoRA act beside the linear layers of a model that stays as it is.

    Raises:
        ValueError: A forward has passed by one of its places.
    """
    called: set[str] = set()

    def beside(place: str, pair: Pair) -> Callable[..., torch.Tensor]:
        def add(module: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
            called.add(place)
            x = args[0]
            A, B = pair.A.to(x.device), pair.B.to(x.device)
            return out + (x.to(A) @ A.T @ B.T).to(out)

        return add

    hooks = [model.get_submodule(place).register_forward_hook(beside(place, own)) for place, own in lora.pairs.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if lora.pairs.keys() - called:
        raise ValueError(
            f"choose_loras: the model never calls {shown(min(lora.pairs.keys() - called))}, which the LoRA in "
            f"{shown(lora.name)} adapts, so that its loss cannot be measured. Leave it out of the candidates."
        )


def _products(loras: list[StockLora]) -> torch.Tensor:
    """(C, C) inner products of what LoRAs add, added up over their places, of the factors alone."""
    products_CC = torch.zeros(len(loras), len(loras), dtype=torch.float64)
    for i, one in enumerate(loras):
        for j, other in enumerate(loras[: i + 1]):
            for place in one.pairs.keys() & other.pairs.keys():
                a, b = one.pairs[place], other.pairs[place]
                own = ((a.B.double().T @ b.B.double()) * (a.A.double() @ b.A.double().T)).sum()
                products_CC[i, j] += own
                products_CC[j, i] = products_CC[i, j]
    return products_CC
