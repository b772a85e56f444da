"""The router losses of a pass that has ended: measured, joined, differentiated, and found again in recomputations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from .forward_pass import ForwardPass
from .joined_losses import LayerLosses, WindowSums, finish
from .measurement import Measurement, measure, own_graph, spread, tensors_of
from .processes import num_processes
from .shared_sums import SharedSums
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
    _prepare(forward_pass)
    calls = _calls(forward_pass)
    compiled = [call for call in calls if call.tied]
    decisions = [tensors_of(call.routing) for call in compiled if call.routing is not None]
    for call, own in zip(compiled, decisions, strict=True):
        # Without a graph it is the first pass of a reentrant checkpoint, whose recomputation injects.
        call.tied = any(tensor.requires_grad for tensor in own.values())
    with own_graph():
        stacks = measure(calls)
        join([forward_pass], window)
        spread(stacks)
    return tie(compiled, decisions, forward_pass.losses.scale, output) if compiled else output


def finish_together(
    passes: Sequence[ForwardPass], window: WindowSums | None, shared: SharedSums | None, device: torch.device
) -> None:
    """The same for all passes of a forward of the whole model, where several processes may call different layers.

    Args:
        passes: Passes whose forward has ended, none of whose calls was compiled.
        window: The accumulation window; None outside one.
        shared: Joins the sums of all processes; None where none has any to join.
        device: Where sums are made that this process has none of.

    Raises:
        ValueError: As in `finish_pass`.
        RuntimeError: As in `SharedSums.join`.
    """
    with own_graph():
        stacks = []
        for forward_pass in passes:
            _prepare(forward_pass)
            stacks += measure(_calls(forward_pass))
        processes = None if shared is None else partial(_join_shared, shared, window, device)
        join(passes, window, processes=processes)
        spread(stacks)


def _join_shared(
    shared: SharedSums, window: WindowSums | None, device: torch.device, layers: Mapping[tuple, LayerLosses]
) -> None:
    """Join with other processes, and note in the window what they alone have measured."""
    absent: dict[tuple, dict[str, torch.Tensor]] = {}
    for slot, sums in shared.join(layers, device).items():
        if window is not None and slot.scope == "accumulation_window":
            absent.setdefault((slot.place, slot.adapter, slot.call), {})[slot.loss] = sums
    for key, own in absent.items():
        assert window is not None
        window.add_absent(key, own, num_processes())


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
    return tie_graph(_calls(forward_pass), scale, lambda: join([forward_pass], window, derive=False), output)


def _calls(forward_pass: ForwardPass) -> list[Measurement]:
    return [call for made in forward_pass.layers.values() for call in made]


def _prepare(forward_pass: ForwardPass) -> None:
    """Keep what tells the calls of one module in a pass apart, and drop masks that turn out not to be theirs."""
    for (place, _), made in forward_pass.layers.items():
        for call in made if len(made) > 1 else ():
            assert call.routing is not None
            call.weights = call.routing.weights.detach()
        if any(call.losses.assumed for call in made):
            _drop_assumed(forward_pass, made, place)


def _drop_assumed(forward_pass: ForwardPass, made: Sequence[Measurement], place: str) -> None:
    """Take the mask from tokens, as those that an expert of the backbone is sent, that were no slices of the rows."""
    assert forward_pass.shape is not None
    for call in made:
        assert call.routing is not None
        call.losses.flat = call.routing.context.num_rows == 1
    groups = join_slices([call.losses for call in made], forward_pass.shape[0] * forward_pass.shape[1], place)
    alone = [group[0] for group in groups if len(group) == 1 and group[0].assumed]
    for call in made:
        if call.routing is not None and any(call.losses is own for own in alone):
            context = replace(call.routing.context, valid=None, sequences=None, num_sequences=1, groups=None)
            call.routing = replace(call.routing, context=context)
            call.losses.assumed, forward_pass.unknown = False, place


def join(
    passes: Sequence[ForwardPass],
    window: WindowSums | None,
    *,
    derive: bool = True,
    processes: Callable[[Mapping[tuple, LayerLosses]], None] | None = None,
) -> None:
    """Join the sums of the calls of some passes; slices of the same rows count as one.

    Args:
        passes: The passes, whose calls know their own sums.
        window: The accumulation window; None outside one.
        derive: Whether to differentiate the losses in them.
        processes: Joins the sums of processes; None where all have the same calls.
    """
    whole_of: dict[tuple, LayerLosses] = {}
    numbers: dict[tuple[str, str], int] = {}
    sliced: list[tuple[ForwardPass, list[tuple[LayerLosses, list[LayerLosses]]]]] = []
    for forward_pass in passes:
        slices: list[tuple[LayerLosses, list[LayerLosses]]] = []
        tokens = 0 if forward_pass.shape is None else forward_pass.shape[0] * forward_pass.shape[1]
        for key, made in forward_pass.layers.items():
            own = [call.losses for call in made]
            groups = join_slices(own, tokens, key[0]) if any(one.part for one in own) else [[one] for one in own]
            for group in groups:
                number = numbers[key] = numbers.get(key, -1) + 1
                whole = whole_of[(*key, number)] = group[0] if len(group) == 1 else as_one(group)
                slices += [(whole, group)] if len(group) > 1 else []
        sliced.append((forward_pass, slices))
    finish(whole_of, window, derive=derive, join=processes)
    for forward_pass, slices in sliced:
        for whole, group in slices:
            for one in group:
                one.joined, one.count, one.gradients = whole.joined, whole.count, whole.gradients
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
