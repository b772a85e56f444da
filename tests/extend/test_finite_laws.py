"""Laws of every registered part on inputs of extreme size: values and gradients are finite numbers.

In float32 and bfloat16 all are. In float16 a value may overflow where it is itself too large to be one: where float32
has a larger one than it holds.
"""

from __future__ import annotations

import pytest
import torch

from moe_peft.extend import LOSSES, RoutedLayer, TokenContext

from .cases import GROUPS, IN, LENGTHS, OUT, PAIRS, PARTS, context, decide, layer_of, on_layers
from .combinations import Choice, losses_for

NUM_TOKENS = len(LENGTHS) * max(LENGTHS)
LARGEST_HALF = 6e4
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def layer_for(choice: Choice) -> RoutedLayer:
    """Weights in float32, as peft keeps adapters, and small enough that products of float16 are none too large."""
    layer = layer_of(choice).float()
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.mul_(0.1)
    return layer


def extremes() -> dict[str, torch.Tensor]:
    """(T, D) inputs by what is extreme about them."""
    x_TD = torch.randn(NUM_TOKENS, IN, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    every_second = (torch.arange(NUM_TOKENS) % 2)[:, None]
    return {
        "large": 1e4 * x_TD,
        "equal": torch.full((NUM_TOKENS, IN), 1e4),
        "of two values": 8e3 * x_TD.sign(),
        "zero": torch.zeros(NUM_TOKENS, IN),
        "large beside zero": 1e4 * x_TD * every_second,
    }


def contexts() -> dict[str, TokenContext]:
    """Three rows, all of them padding, one of them padding, and without a mask."""
    one_empty = context().valid.clone()
    one_empty[max(LENGTHS) : 2 * max(LENGTHS)] = False
    return {
        "padded": context(True),
        "all padding": context(True, valid=torch.zeros(NUM_TOKENS, dtype=torch.bool)),
        "one row of padding": context(True, valid=one_empty),
        "no mask": context(True, valid=None),
        "evaluation": context(False),
    }


def of_one_token(count: int) -> TokenContext:
    """A row of one token, or of none."""
    rows = {"sequences": torch.zeros(count, dtype=torch.long), "num_sequences": 1, "num_rows": 1, "groups": GROUPS[:1]}
    marks = {"valid": torch.ones(count, dtype=torch.bool), "prompt": torch.ones(count, dtype=torch.bool)}
    return context(True, token_ids=torch.full((count,), 5), **rows, **marks)


def results(
    choice: Choice, layer: RoutedLayer, x_TD: torch.Tensor, dtype: torch.dtype, known: TokenContext
) -> dict[str, torch.Tensor]:
    """Every value and gradient of a layer and of the losses that fit."""
    torch.manual_seed(0)
    x_TD = x_TD.to(dtype).requires_grad_()
    routing = decide(layer, x_TD, known)
    found = {"weights": routing.weights, "probabilities": routing.probs}
    found.update({f"loss {name}": LOSSES[name]()(routing) for name in losses_for(choice)})
    out_TO = layer.add("default", x_TD, torch.zeros(len(x_TD), OUT, dtype=dtype), known)
    found["output"] = out_TO
    leaves = {"input": x_TD, **{name: p for name, p in layer.named_parameters() if p.requires_grad}}
    losses = [value for name, value in found.items() if name.startswith("loss") and value.requires_grad]
    goals = {"losses": torch.stack(losses).sum()} if losses else {}
    if len(x_TD) and out_TO.requires_grad:
        goals["output"] = out_TO.float().mean()
    for name, goal in goals.items():
        grads = torch.autograd.grad(1e-3 * goal, list(leaves.values()), allow_unused=True, retain_graph=True)
        found.update(
            {f"gradient of {name} in {leaf}": g for leaf, g in zip(leaves, grads, strict=True) if g is not None}
        )
    return {name: value.detach().float() for name, value in found.items()}


def assert_finite(
    choice: Choice, layer: RoutedLayer, x_TD: torch.Tensor, known: TokenContext, what: str, dtypes=DTYPES
) -> None:
    single = results(choice, layer, x_TD, torch.float32, known)
    # Gates without a bound scale activations, which float16 holds up to its largest number.
    scaled = single["weights"].numel() and single["weights"].abs().max() * x_TD.abs().max() > LARGEST_HALF
    for dtype in dtypes:
        if dtype == torch.float16 and scaled:
            continue
        made = single if dtype == torch.float32 else results(choice, layer, x_TD, dtype, known)
        for name, value in made.items():
            own = single.get(name)
            too_large = dtype == torch.float16 and own is not None and own.numel() and own.abs().max() > LARGEST_HALF
            assert too_large or torch.isfinite(value).all(), f"{name} of {what} input in {dtype}"


@on_layers(PARTS, PAIRS)
def test_inputs_of_any_size_have_finite_values_and_gradients(choice):
    layer, known = layer_for(choice), context(True)
    for what, x_TD in extremes().items():
        assert_finite(choice, layer, x_TD, known, what)


@on_layers(PARTS, PAIRS)
def test_any_padding_leaves_values_and_gradients_finite(choice):
    layer, x_TD = layer_for(choice), extremes()["large"]
    for what, known in contexts().items():
        assert_finite(choice, layer, x_TD, known, what, [torch.float32])


@on_layers(PARTS, PAIRS)
@pytest.mark.parametrize("count", [0, 1])
def test_one_token_and_none_have_finite_values_and_gradients(choice, count):
    x_TD = extremes()["large"][:count]
    assert_finite(choice, layer_for(choice), x_TD, of_one_token(count), f"{count} tokens")
