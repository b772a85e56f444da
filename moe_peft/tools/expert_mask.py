"""Steer a model by its experts: for a while, switch some off and force others (MoTE, arXiv 2502.11096).

Of an adapter's own routers, before anything is selected:

    z_e = -inf for experts that are off,   z_e = the largest score of the token, and a little, for those that are on

so that other experts take the places of those that are off. A backbone has decided when its experts are called: a
slot of an expert that is off has weight zero, an expert that is on takes the slot of the smallest weight and has the
largest one, and the weights of the token keep their sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..backbone.experts_call import ExpertsCall, experts_call
from ..backbone.structure import find_moe_layers
from ..layers import routed_layers
from ..messages import shown
from ..routers import Router
from ..types import Routing, TokenContext
from .checks import check_module

Choice = Sequence[int] | Mapping[Any, Sequence[int]]


@dataclass(frozen=True)
class Steered:
    """A place, and the experts that are off and on there.

    Attributes:
        name: Name of the module.
        layer: Index of its layer; None outside of numbered layers.
        num_experts: E.
        module: Its router, or the backbone's experts module.
    """

    name: str
    layer: int | None
    num_experts: int
    module: nn.Module


@contextmanager
def expert_mask(
    model: nn.Module,
    off: Choice = (),
    on: Choice = (),
    *,
    adapter_name: str = "default",
    backbone: bool = False,
) -> Iterator[None]:
    """Switch experts off, and force others, in the forwards of a block.

    Args:
        model: A model with a routed adapter, or a mixture of experts.
        off: Experts that no token uses: ids for all places, or a dict from the index of a layer, or the name of a
            place, to ids.
        on: Experts that every token uses, in the same form.
        adapter_name: The adapter whose own routers are steered.
        backbone: Whether the backbone's routing is steered in place of an adapter's.

    Raises:
        TypeError: The model is no module.
        ValueError: Nothing is to be steered, there is no such adapter, place or expert, an expert is both off and on,
            or no expert is left. The model is as it was.
    """
    check_module(model, "expert_mask")
    places = _of_backbone(model) if backbone else _of_adapter(model, adapter_name)
    chosen = {place.name: (_ids(off, place, "off"), _ids(on, place, "on")) for place in places}
    _check(off, on, places, chosen)
    with ExitStack() as stack:
        for place in places:
            own_off, own_on = chosen[place.name]
            if own_off or own_on:
                stack.callback(_hook(place, own_off, own_on, backbone).remove)
        yield


def _of_adapter(model: nn.Module, name: str) -> list[Steered]:
    found = []
    for layer in routed_layers(model):
        router: Any = layer.router_of(name) if name in layer.experts else None
        if router is not None and router.reads != "block":  # who follows a decision gets one that is steered
            found.append(Steered(layer.place, _layer(layer.place), router.num_experts, router))
    if not found:
        raise ValueError(
            f"expert_mask: the model has no adapter {shown(name)} with routers of its own. Name one, or write "
            "backbone=True to steer the backbone's routing."
        )
    return found


def _of_backbone(model: nn.Module) -> list[Steered]:
    layers = find_moe_layers(model)
    if not layers:
        raise ValueError(f"expert_mask: {type(model).__name__} has no experts of its own. Leave backbone=True out.")
    return [Steered(own.experts, own.index, own.num_experts, model.get_submodule(own.experts)) for own in layers]


def _layer(place: str) -> int | None:
    return next((int(part) for part in place.split(".") if part.isdecimal()), None)


def _ids(choice: Choice, place: Steered, name: str) -> tuple[int, ...]:
    lists = isinstance(choice, Mapping) and all(_is_list(own) for own in choice.values())
    if isinstance(choice, Mapping) and lists:
        own = [*choice.get(place.name, ()), *(choice.get(place.layer, ()) if place.layer is not None else ())]
    elif _is_list(choice):
        own = list(choice)
    else:
        raise ValueError(f"expert_mask: {name}={shown(choice)} must be a list of experts, or a dict of such lists.")
    for expert in own:
        if type(expert) is not int or not 0 <= expert < place.num_experts:
            raise ValueError(
                f"expert_mask: {name} has the expert {shown(expert)}, but {place.name} has experts from 0 to "
                f"{place.num_experts - 1}."
            )
    return tuple(sorted(set(own)))


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _check(off: Choice, on: Choice, places: list[Steered], chosen: Mapping[str, tuple]) -> None:
    known = {place.name for place in places} | {place.layer for place in places}
    for name, choice in (("off", off), ("on", on)):
        unknown = (
            [key for key in choice if isinstance(key, bool) or key not in known] if isinstance(choice, Mapping) else []
        )
        if unknown:
            raise ValueError(
                f"expert_mask: {name} names {shown(unknown[0])}, which is no layer or place that is steered; they are "
                f"{shown(sorted(place.name for place in places))}."
            )
    if not any(own for pair in chosen.values() for own in pair):
        raise ValueError("expert_mask: neither `off` nor `on` names an expert. Write off=[3], or off={0: [3]}.")
    for place in places:
        own_off, own_on = chosen[place.name]
        both = sorted(set(own_off) & set(own_on))
        if both:
            raise ValueError(f"expert_mask: the experts {both} of {place.name} are both off and on. Take one out.")
        if len(own_off) == place.num_experts:
            raise ValueError(f"expert_mask: every expert of {place.name} is off. Leave one, or disable the adapter.")
        if own_on and isinstance(place.module, Router) and not _decides_by_scores(place.module):
            raise ValueError(
                f"expert_mask: {type(place.module).__name__} at {place.name} does not decide by scores, so no expert "
                "can be forced there. Switch the others off in place of it."
            )


def _decides_by_scores(router: Router) -> bool:
    return type(router).decide is Router.decide and type(router).forward is Router.forward


def _hook(place: Steered, off: tuple[int, ...], on: tuple[int, ...], backbone: bool) -> Any:
    if backbone:

        def steer_call(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            call = experts_call(args, kwargs)
            changed = steered_call(call, off, on, place.num_experts)
            swap = {id(call.index): changed.index, id(call.weights): changed.weights}
            return tuple(swap.get(id(a), a) for a in args), {k: swap.get(id(v), v) for k, v in kwargs.items()}

        return place.module.register_forward_pre_hook(steer_call, with_kwargs=True, prepend=True)

    def steer(module: nn.Module, args: tuple, routing: Routing) -> Routing:
        return steered_routing(module, routing, off, on)

    return place.module.register_forward_hook(steer)


def steered_routing(router: Any, routing: Routing, off: Sequence[int], on: Sequence[int]) -> Routing:
    """Decide again with scores that are steered.

    Args:
        router: Who decided.
        routing: What it decided.
        off: Experts that get no weight.
        on: Experts that are among the best.
    """
    if _decides_by_scores(router):
        logits = routing.logits.clone()
        logits[:, list(off)] = float("-inf")
        if on:
            best = logits[:, : routing.num_experts].amax(-1, keepdim=True)
            logits[:, list(on)] = best + 1e-4 * (1 + best.abs())
        context: TokenContext = routing.context
        routing = router.decide(logits, context)
    if not off:
        return routing
    weights, experts = routing.weights, routing.experts
    if experts is None:
        mask = torch.zeros(routing.num_experts, dtype=torch.bool, device=weights.device)
        mask[list(off)] = True
        return replace(routing, weights=weights.masked_fill(mask, 0.0))
    is_off = torch.isin(experts, torch.tensor(off, device=experts.device))
    # A slot that was left for want of other experts has none.
    experts = experts.masked_fill(is_off, routing.num_experts)
    return replace(routing, weights=weights.masked_fill(is_off, 0.0), experts=experts)


def steered_call(call: ExpertsCall, off: Sequence[int], on: Sequence[int], num_experts: int) -> ExpertsCall:
    """Steer what a backbone's experts are called with.

    Args:
        call: The backbone's decision.
        off: Experts that get no weight.
        on: Experts that get a slot.
        num_experts: E.

    Returns:
        A decision whose weights have the same sum, unless every expert of a token is off.
    """
    index, weights = call.index.clone(), call.weights.float().clone()
    total = weights.sum(-1, keepdim=True)
    if off:
        weights = weights.masked_fill(torch.isin(index, torch.tensor(off, device=index.device).to(index.dtype)), 0.0)
    for expert in on:
        has = (index == expert).any(-1)
        # Experts that were forced before keep their slots.
        free = weights.masked_fill(torch.isin(index, torch.tensor(on, device=index.device).to(index.dtype)), 2.0**60)
        slot = free.argmin(-1, keepdim=True)
        largest = weights.amax(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        moved_index, moved = index.scatter(-1, slot, expert), weights.scatter(-1, slot, largest)
        index = torch.where(has[:, None], index, moved_index)
        weights = torch.where(has[:, None], torch.where(index == expert, largest, weights), moved)
    weights = weights * (total / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny))
    return ExpertsCall(call.hidden, index, weights.to(call.weights.dtype))
