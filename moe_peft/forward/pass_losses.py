"""The router losses of a pass that has ended: measured, joined, differentiated, and found again in recomputations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .forward_pass import ForwardPass
from .joined_losses import LayerLosses, WindowSums, finish
from .measurement import Measurement, measure, own_graph, spread, tensors_of
from .slices import as_one, join_slices
from .tied_output import tie, tie_graph


def finish_pass(forward_pass: ForwardPass, window: WindowSums | None, output: Any) -> Any:
    """Give every call of a pass its losses' values, and their gradient in what it decided.

    Args:
        forward_pass: A pass whose forward has ended.
        window: The accumulation window; None outside one.
        output: What its stack returns.

    Returns:
        The output, which carries the gradients of calls that compiled code has made.

    Raises:
        ValueError: A loss of slices has no meaning for the whole, or lacks something of the batch.
    """
    calls = _calls(forward_pass)
    for made in forward_pass.layers.values():
        for call in made if len(made) > 1 else ():
            assert call.routing is not None
            call.weights = call.routing.weights.detach()
    compiled = [call for call in calls if call.tied]
    decisions = [tensors_of(call.routing) for call in compiled if call.routing is not None]
    for call, own in zip(compiled, decisions, strict=True):
        # Without a graph it is the first pass of a reentrant checkpoint, whose recomputation injects.
        call.tied = any(tensor.requires_grad for tensor in own.values())
    with own_graph():
        stacks = measure(calls)
        join(forward_pass, window)
        spread(stacks)
    return tie(compiled, decisions, forward_pass.losses.scale, output) if compiled else output


def finish_compiled(forward_pass: ForwardPass, window: WindowSums | None, output: Any) -> Any:
    """The same in compiled code, for calls that it has made: the losses are a part of its graph.

    Args:
        forward_pass: A pass whose forward has ended.
        window: The accumulation window; None outside one.
        output: What its stack returns.

    Returns:
        The output, which carries the gradients.
    """
    scale = forward_pass.losses.scale
    return tie_graph(_calls(forward_pass), scale, lambda: join(forward_pass, window, derive=False), output)


def _calls(forward_pass: ForwardPass) -> list[Measurement]:
    return [call for made in forward_pass.layers.values() for call in made]


def join(forward_pass: ForwardPass, window: WindowSums | None, *, derive: bool = True) -> None:
    """Join the sums of a pass's calls; slices of the same rows count as one.

    Args:
        forward_pass: The pass, whose calls know their own sums.
        window: The accumulation window; None outside one.
        derive: Whether to differentiate the losses in them.
    """
    whole_of: dict[tuple, LayerLosses] = {}
    slices: list[tuple[LayerLosses, list[LayerLosses]]] = []
    length = 0 if forward_pass.shape is None else forward_pass.shape[1]
    for key, made in forward_pass.layers.items():
        losses = [call.losses for call in made]
        groups = join_slices(losses, length, key[0]) if any(own.part for own in losses) else [[own] for own in losses]
        for number, group in enumerate(groups):
            whole = whole_of[(*key, number)] = group[0] if len(group) == 1 else as_one(group)
            slices += [(whole, group)] if len(group) > 1 else []
    finish(whole_of, window, derive=derive)
    for whole, group in slices:
        for own in group:
            own.joined, own.count, own.gradients = whole.joined, whole.count, whole.gradients
    if slices:
        _keep_as_one(forward_pass, slices)


def repeated_call(made: Sequence[Measurement], call: Measurement) -> Measurement:
    """The call of a pass that a recomputation repeats.

    Args:
        made: The calls of the same layer in that pass.
        call: The decision that was made again.

    Returns:
        One of those; the call itself, measured alone, where the pass knows of none.
    """
    if not made:
        with own_graph():
            stacks = measure([call])
            finish({("", "", 0): call.losses}, None)
            spread(stacks)
        return call
    if len(made) == 1:
        return made[0]
    # One module at several depths: the calls are repeated in reverse order, and told apart by what they decided.
    assert call.routing is not None
    weights = call.routing.weights.detach()
    alike = [own for own in made if own.weights is not None and own.weights.shape == weights.shape]
    return min(alike or made, key=lambda own: _distance(own, weights))


def _distance(call: Measurement, weights: torch.Tensor) -> float:
    return 0.0 if call.weights is None else float((call.weights - weights).abs().sum())


def _keep_as_one(forward_pass: ForwardPass, slices: Sequence[tuple[LayerLosses, list[LayerLosses]]]) -> None:
    """Have one loss of each sliced place in the values, where the layers keep those of the slices."""
    for key, made in forward_pass.losses.layers.items():
        for whole, group in slices:
            if any(layer is group[0] for layer in made):
                first = next(number for number, layer in enumerate(made) if layer is group[0])
                made = [layer for layer in made if not any(layer is part for part in group)]
                made.insert(first, whole)
        forward_pass.losses.layers[key] = made
