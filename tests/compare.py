"""Comparison of two computations, forward and gradient, and random decisions to compare on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from moe_peft.telemetry.functions import record
from moe_peft.types import Routing, TokenContext


def gradients(output: torch.Tensor, leaves: list[torch.Tensor], seed: int = 0) -> list[torch.Tensor]:
    """Gradient of a random weighted sum of the output; zeros for a leaf that the output does not use."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=output.dtype)
    if not output.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad((output * weights).sum(), leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


def assert_same(actual, expected, actual_leaves, expected_leaves, tolerance: float = 1e-12) -> None:
    """Same values and same gradients for each pair of leaves."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    pairs = zip(gradients(actual, actual_leaves), gradients(expected, expected_leaves), strict=True)
    for place, (got, wanted) in enumerate(pairs):
        torch.testing.assert_close(
            got, wanted, rtol=tolerance, atol=tolerance, msg=lambda m, place=place: f"gradient {place}: {m}"
        )


def random_routing(
    num_tokens: int,
    num_experts: int,
    top_k: int | None = None,
    *,
    seed: int = 0,
    unused: int | None = None,
    context: TokenContext | None = None,
) -> Routing:
    """A float64 decision whose logits are a leaf; no token asks for the expert `unused`."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64).requires_grad_()
    shown = logits
    if unused is not None:
        penalty = torch.zeros(num_experts, dtype=torch.float64)
        penalty[unused] = -30.0
        shown = logits + penalty
    probs = shown.softmax(-1)
    context = context or TokenContext()
    if top_k is None:
        return Routing(weights=probs, experts=None, logits=logits, probs=probs, context=context)
    weights, experts = probs.topk(top_k, dim=-1)
    return Routing(weights=weights, experts=experts, logits=logits, probs=probs, context=context)


def full_routing(num_tokens: int, num_experts: int, top_k: int | None = None, **settings) -> Routing:
    """A random decision that holds all that losses may ask for; arguments as in `random_routing`."""
    routing = random_routing(num_tokens, num_experts, top_k, **settings)
    extras = {"null_probs": routing.probs[:, :2] / 3, "sparsity": routing.logits[:, 0] / 9 - 1}
    extras |= {"student_probs": routing.probs, "teacher_probs": routing.probs.detach() / 2}
    return replace(routing, extras=extras)


def as_lists(matrix: torch.Tensor) -> list[list[torch.Tensor]]:
    """Rows of a matrix as lists of 0-d tensors, for the references."""
    return [list(row) for row in matrix]


def gates_of(routing: Routing) -> list[dict[int, torch.Tensor]]:
    """The decision as one {expert: weight} per token, read slot by slot."""
    if routing.experts is None:
        return [dict(enumerate(row)) for row in routing.weights]
    return [
        {int(e): w for e, w in zip(experts, weights, strict=True) if int(e) < routing.num_experts}
        for experts, weights in zip(routing.experts, routing.weights, strict=True)
    ]


def chosen_of(routing: Routing) -> list[list[int]]:
    """The experts each token asked for, best first."""
    if routing.experts is None:
        return [list(range(routing.num_experts))] * routing.probs.shape[0]
    return [[int(e) for e in row if int(e) < routing.num_experts] for row in routing.experts]


def saved_for_backward(compute: Callable[[], object], besides: Iterable[torch.Tensor] = ()) -> list[torch.Tensor]:
    """Tensors that a computation keeps for its backward pass, one for each storage that is not among `besides`."""
    known = {tensor.untyped_storage().data_ptr() for tensor in besides}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in known:
            kept.setdefault(storage.data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = compute()  # the graph keeps the storages alive while they are compared
    del result
    return list(kept.values())


def counts(model, batch):
    """Place -> number of tokens that its decisions of a forward count."""
    with record(model) as routings:
        model(**batch)
    return {
        place: sum(len(made.probs) if made.valid is None else int(made.valid.sum()) for made in own)
        for place, own in routings.items()
    }
