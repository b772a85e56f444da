"""Forwards in which processes call different layers, and what one process makes of the same rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from peft import get_peft_model
from torch import distributed as dist
from torch import nn

from moe_peft import RoutedConfig, routed_layers
from moe_peft.forward.find import find_tracker
from moe_peft.forward.joined_losses import WindowSums
from tests.backbones.multimodal_cases import batch_for, with_adapter
from tests.contract.cases import randomize
from tests.tiny import padded_batch, tiny_llama, tiny_t5

LENGTHS = [9, 7, 2, 3]
Batch = dict[str, torch.Tensor]


def config_of(scope: str, **fields) -> RoutedConfig:
    settings = {"num_experts": 4, "top_k": 2, "r": 2, "router_aux_loss_coef": 1.0, "router_z_loss_coef": 0.2}
    return RoutedConfig(load_balancing_scope=scope, lora_dropout=0.0, **{**settings, **fields})


def llama(scope: str) -> nn.Module:
    return get_peft_model(tiny_llama(), config_of(scope))


def rows(rank: int) -> Batch:
    return {name: own[2 * rank : 2 * rank + 2] for name, own in padded_batch(LENGTHS, seed=4).items()}


def at_depth(model: nn.Module, rank: int, depth: int) -> Batch:
    """The rows of a process, which runs the first layers alone."""
    model.get_base_model().config.num_hidden_layers = depth
    return rows(rank)


def sequence_to_sequence(model: nn.Module, rank: int, encodes: int) -> Batch:
    """The rows of a process, which is given what the encoder would say."""
    batch = rows(rank)
    own = {"decoder_input_ids": batch["input_ids"].flip(0), "attention_mask": batch["attention_mask"]}
    if encodes:
        return {**own, "input_ids": batch["input_ids"]}
    states = torch.randn(*batch["input_ids"].shape, 32, generator=torch.Generator().manual_seed(rank))
    return {**own, "encoder_outputs": (states,)}


def text_or_images(model: nn.Module, rank: int, has_images: int) -> Batch:
    """The rows of a process, with images or without."""
    return batch_for("llava") if has_images else rows(rank)


@dataclass(frozen=True)
class Case:
    """Forwards of two processes.

    Attributes:
        model: Makes the adapted model, given the scope.
        batch: Gives the batch of (model, rank, what the process does).
        steps: What each of the two processes does, forward by forward.
        scope: What the losses are measured on.
    """

    model: Callable[[str], nn.Module]
    batch: Callable[[nn.Module, int, int], Batch]
    steps: Sequence[tuple[int, int]]
    scope: str = "global_batch"


DEPTHS = ((1, 2), (0, 2), (2, 1), (2, 2))
CASES = {
    "depths": Case(llama, at_depth, DEPTHS),
    # From the second forward on all places are known, and one process stays behind.
    "settled": Case(llama, at_depth, ((2, 2), (0, 2), (1, 0), (0, 0), (2, 1))),
    "window": Case(llama, at_depth, ((1, 2), (0, 2), (2, 1)), "accumulation_window"),
    "encoder": Case(
        lambda scope: get_peft_model(tiny_t5(dropout_rate=0.0), config_of(scope)),
        sequence_to_sequence,
        ((1, 0), (0, 0), (0, 1), (1, 1)),
    ),
    # No process has an image in the first forward.
    "images": Case(
        lambda scope: with_adapter("llava", config_of(scope, target_modules="all-linear")),
        text_or_images,
        ((0, 0), (1, 1), (0, 1), (1, 0)),
    ),
}


def model_of(case: Case, scope: str) -> nn.Module:
    torch.manual_seed(0)
    model = case.model(scope)
    # The last layer of an image encoder is read, not the one before it.
    model.get_base_model().config.vision_feature_layer = -1
    randomize(model)
    return model.train()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Those of the routers, which are taken away; zero where there are none."""
    found = {}
    for name, parameter in model.named_parameters():
        if "_router." in name:
            found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        parameter.grad = None
    return found


def of_two_processes(case: Case, rank: int) -> Iterator[dict[str, torch.Tensor]]:
    """Mean over the processes of the gradients of the router losses alone, forward by forward."""
    model = model_of(case, case.scope)
    find_tracker(model).window = WindowSums() if case.scope == "accumulation_window" else None
    for step in case.steps:
        logits = model(**case.batch(model, rank, step[rank])).logits
        if logits.requires_grad:
            (0.0 * logits.sum()).backward()
        found = gradients(model)
        for gradient in found.values():
            dist.all_reduce(gradient)
            gradient /= 2
        yield found


def of_one_process(case: Case) -> Iterator[dict[str, torch.Tensor]]:
    """The same from the definition: one loss of the sums of all rows, at each place."""
    model = model_of(case, "micro_batch")
    tracker, earlier, count = find_tracker(model), {}, 0
    tracker.loss_scale = 0.0
    objectives = {layer.place: layer.objectives["default"] for layer in routed_layers(model)}
    for step in case.steps:
        sums: dict[tuple[str, str], torch.Tensor] = {}

        def add(place, adapter, routing, sums=sums):
            for name, loss in objectives[place].losses.items():
                sums[place, name] = sums.get((place, name), 0.0) + loss.sums(routing)

        tracker.training_observers = [add]
        for rank, action in enumerate(step):
            model(**case.batch(model, rank, action))
        joins = case.scope == "accumulation_window"
        count += 1 if joins or not count else 0
        total = torch.zeros((), requires_grad=True)
        for (place, name), own in sums.items():
            objective = objectives[place]
            value = objective.losses[name].value(own + earlier.get((place, name), 0.0))
            total = total + count * objective.coefficients[name] * value
            if joins:
                earlier[place, name] = earlier.get((place, name), 0.0) + own.detach()
        total.backward()
        yield gradients(model)
