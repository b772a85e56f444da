"""What a part denies of itself is so: a promise that it does not make is broken somewhere, or it should be made."""

from __future__ import annotations

import pytest
import torch

from moe_peft.extend import EXPERTS, Routing

from . import registered
from .cases import LENGTHS, OUT, PARTS, context, decide, inputs, layer_of, name_of, on_layers, promised, token
from .combinations import Choice

WIDTH = max(LENGTHS)
PROMISES = ("causal", "batch_invariant", "decode_stateless")
with registered():
    DENYING = [choice for choice in PARTS if not promised(choice, *PROMISES)]


def gates(layer, x_TD: torch.Tensor, training: bool) -> torch.Tensor:
    torch.manual_seed(0)
    return decide(layer, x_TD, context(training)).gate_matrix()


def changed(x_TD: torch.Tensor, tokens: slice) -> torch.Tensor:
    other_TD = x_TD.clone()
    other_TD[tokens] = -3 * other_TD[tokens] + 1
    return other_TD


def breaks(promise: str, layer, x_TD: torch.Tensor, training: bool) -> bool:
    """Whether these tokens show that a promise does not hold."""
    before_TE = gates(layer, x_TD, training)
    if promise == "causal":
        later = slice(LENGTHS[0] - 1, WIDTH)
        after_TE = gates(layer, changed(x_TD, later), training)
        return not torch.allclose(after_TE[: later.start], before_TE[: later.start])
    if promise == "batch_invariant":
        others = slice(WIDTH, None)
        return not torch.allclose(gates(layer, changed(x_TD, others), training)[:WIDTH], before_TE[:WIDTH])
    known = context(training)
    alone = [decide(layer, x_TD[t : t + 1], token(known, t)).gate_matrix() for t in range(LENGTHS[0])]
    return not torch.allclose(torch.cat(alone), before_TE[: LENGTHS[0]])


@pytest.mark.parametrize("choice", DENYING, ids=name_of)
def test_a_promise_that_is_not_made_does_not_hold(choice: Choice):
    layer = layer_of(choice)
    for promise in PROMISES:
        tries = [(inputs(seed)[0], training) for seed in range(4) for training in (False, True)]
        assert promised(choice, promise) or any(breaks(promise, layer, *one) for one in tries), (
            f"{promise}=False, and nothing shows it: leave it out, so that more models may have the part"
        )


@on_layers(PARTS)
def test_parts_that_do_not_merge_differ_by_the_token_or_are_not_linear(choice: Choice):
    layer, (x_TD, _) = layer_of(choice), inputs()
    bank, router = layer.experts["default"], layer.router["default"]
    if not router.mergeable:
        rows_TE = gates(layer, x_TD, training=False)[context().valid]
        assert not torch.allclose(rows_TE, rows_TE[:1].expand_as(rows_TE)), (
            f"{type(router).__name__} weighs experts alike for every token: it could be mergeable"
        )
    if not bank.mergeable and EXPERTS[choice[3]].placement is None:
        weights_TE = torch.linspace(0.2, 0.9, bank.num_choices).double().expand(len(x_TD), -1)
        constant = Routing(weights=weights_TE, experts=None, logits=weights_TE, probs=weights_TE)
        W_OD = torch.randn(OUT, x_TD.shape[1]).double()

        def added(x_TD: torch.Tensor) -> torch.Tensor:
            return bank(x_TD, x_TD @ W_OD.T, constant) - x_TD @ W_OD.T

        assert not torch.allclose(added(x_TD) + added(2 * x_TD), added(3 * x_TD)), (
            f"{type(bank).__name__} adds a linear map of its input: it could be mergeable"
        )
