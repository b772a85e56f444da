"""Laws of every registered router loss, on decisions of a router that gives what it needs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_peft.config.fields import LARGEST
from moe_peft.extend import LOSSES, RouterLoss, Routing, RoutingStatistics
from moe_peft.routers import router_needs

from . import registered
from .cases import close, context, decide, inputs, layer_of
from .combinations import fitting, losses_for

with registered():
    NAMES = sorted(LOSSES)
    # Routers that ask nothing of experts come first, as such a decision always has what its loss teaches.
    FITTING = sorted(fitting(), key=lambda choice: len(router_needs(*choice[:3])))
    CHOICE = {name: next(choice for choice in FITTING if name in losses_for(choice)) for name in NAMES}
every_loss = pytest.mark.parametrize("name", NAMES)


def made(name: str, training: bool = True) -> tuple[RouterLoss, Routing, list[torch.Tensor]]:
    """The loss, a decision about three rows with padding, and the router's parameters."""
    layer, (x_TD, _) = layer_of(CHOICE[name]), inputs()
    leaves = [p for p in layer.router["default"].parameters() if p.requires_grad]
    return LOSSES[name](), decide(layer, x_TD, context(training)), leaves


def changed(routing: Routing, change, **fields) -> Routing:
    """The same decision with all of its tensors changed."""
    own = {name: change(getattr(routing, name)) for name in ("weights", "logits", "probs")}
    extras = {name: change(tensor) for name, tensor in routing.extras.items()}
    return replace(routing, **own, extras=extras, **fields)


def cut(routing: Routing, kept_T: torch.Tensor, known) -> Routing:
    """The decision about some of the tokens."""
    experts = None if routing.experts is None else routing.experts[kept_T]
    return changed(routing, lambda tensor: tensor[kept_T], experts=experts, context=known)


@every_loss
def test_it_is_an_unscaled_float32_scalar_that_trains_the_router(name):
    loss, routing, leaves = made(name)
    value = loss(routing)
    assert value.ndim == 0 and torch.isfinite(value)
    grads = torch.autograd.grad(value, leaves, allow_unused=True)
    assert any(grad is not None and grad.any() for grad in grads), f"{name} has no gradient in the router"
    assert all(grad is None or torch.isfinite(grad).all() for grad in grads)
    single = loss(changed(routing, lambda tensor: tensor.float()))
    assert single.dtype == torch.float32, f"{name} of a float32 decision is {single.dtype}"
    torch.testing.assert_close(single.double(), value, rtol=1e-4, atol=1e-6)


@every_loss
def test_sums_of_rows_add_up_to_those_of_the_batch(name):
    loss, routing, _ = made(name)
    known, per_row = routing.context, len(routing.probs) // routing.context.num_rows
    parts = []
    for row in range(known.num_rows):
        kept_T = torch.arange(row * per_row, (row + 1) * per_row)
        parts.append(loss.sums(cut(routing, kept_T, known.rows([row]))))
    advice = f"{name}: sums must be sums over tokens or sequences, and value a function of them alone"
    close(sum(parts), loss.sums(routing), advice)
    close(loss.value(sum(parts)), loss(routing), advice)
    stacked = torch.stack([parts[0], parts[1]])
    rows = torch.stack([loss.value(parts[0]), loss.value(parts[1])])
    close(loss.value(stacked), rows, f"{name}: value takes (..., N) sums, one row per layer; index from the end")


@every_loss
def test_sums_of_positions_add_up_where_it_says_additive(name):
    loss, routing, _ = made(name)
    known = routing.context
    if loss.additive:
        parts = []
        for t in range(len(routing.probs)):
            one = torch.tensor([t])
            own = replace(known, valid=known.valid[one], sequences=known.sequences[one], num_rows=1)
            parts.append(loss.sums(cut(routing, one, own)))
        close(sum(parts), loss.sums(routing), f"{name}: sums of slices differ from those of the whole; additive=False")


@every_loss
@pytest.mark.parametrize("junk", [7.0, float("nan")])
def test_it_is_blind_to_padding(name, junk):
    loss, routing, leaves = made(name)
    valid_T = routing.context.valid
    shown = changed(routing, lambda tensor: torch.where(valid_T.view(-1, *[1] * (tensor.dim() - 1)), tensor, junk))
    values = [loss(routing), loss(shown)]
    advice = f"{name} reads rows where routing.valid is False; use masked_sum and num_valid"
    close(values[1], values[0], advice)
    grads = [torch.autograd.grad(value, leaves, allow_unused=True, retain_graph=True) for value in values]
    for found, wanted in zip(*reversed(grads), strict=True):
        assert (found is None) == (wanted is None)
        if found is not None:
            close(found, wanted, advice)


@every_loss
def test_no_valid_token_has_a_finite_loss_with_finite_gradients(name):
    loss, routing, leaves = made(name)
    known = replace(routing.context, valid=torch.zeros_like(routing.context.valid))
    empty = replace(known, valid=known.valid[:0], sequences=known.sequences[:0])
    for own in (replace(routing, context=known), cut(routing, torch.zeros(0, dtype=torch.long), empty)):
        value = loss(own)
        assert torch.isfinite(value), f"{name} of no token is {value}; divide by a count of at least one"
        grads = torch.autograd.grad(value, leaves, allow_unused=True, retain_graph=True)
        assert all(grad is None or torch.isfinite(grad).all() for grad in grads), name


@every_loss
def test_a_coefficient_that_adapts_stays_in_range_and_any_other_stays_as_it_is(name):
    loss, routing, _ = made(name)
    statistics, coefficient = [RoutingStatistics.of(routing)] * 2, 0.1
    for _ in range(3000 if loss.adapts else 3):
        coefficient = float(loss.adapt(coefficient, statistics))
    if loss.adapts:
        assert 0 <= coefficient <= LARGEST, f"{name}: after 3000 equal steps its weight is {coefficient}; clamp it"
    else:
        assert coefficient == 0.1, f"{name} changes its coefficient without saying adapts"
