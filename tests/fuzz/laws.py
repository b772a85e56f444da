"""What is compared, and how a broken law is reported."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

WRAPPERS = frozenset({"base_model", "base_layer", "original_module", "token_adapter"})


class BrokenLawError(AssertionError):
    """A promise that a model did not keep; two failures with the same `law` are taken for one fault."""

    def __init__(self, law: str, detail: str = "") -> None:
        super().__init__(f"{law}: {detail}" if detail else law)
        self.law = law


def plain_name(name: str) -> str:
    """Name of a tensor without what peft's wrappers put into it."""
    parts = name.removeprefix("base_model.model.").split(".")
    return ".".join(part for part in parts if part not in WRAPPERS)


def adapter_tensors(model: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """An adapter's parameters by plain name, with the adapter's own name replaced."""
    found = {}
    for name, parameter in model.named_parameters():
        parts = plain_name(name).split(".")
        if adapter in parts:
            found[".".join("*" if part == adapter else part for part in parts)] = parameter
    return found


def base_tensors(model: nn.Module, adapters: Iterable[str]) -> dict[str, torch.Tensor]:
    """Parameters that belong to no adapter, by plain name."""
    adapters = set(adapters)
    named = ((plain_name(name), parameter) for name, parameter in model.named_parameters())
    return {name: parameter for name, parameter in named if not adapters.intersection(name.split("."))}


def require_close(
    law: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float, least: float = 1e-3
) -> None:
    """Compare two tensors on the scale of the expected one, or the least that is given."""
    if found.shape != expected.shape:
        raise BrokenLawError(law, f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    error = float((found - expected).abs().max()) if expected.numel() else 0.0
    if not error <= tolerance * max(scale, least):
        raise BrokenLawError(law, f"off by {error:.3g} on a scale of {scale:.3g}")


def require_same_tensors(
    law: str, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float
) -> None:
    """Compare tensors by name; small ones may be differences of large ones, and are rounded on their scale."""
    if found.keys() != expected.keys():
        raise BrokenLawError(law, f"only one side has {sorted(found.keys() ^ expected.keys())[:3]}")
    largest = max((float(tensor.abs().max()) for tensor in expected.values() if tensor.numel()), default=0.0)
    least = max(1e-3, 0.01 * largest)
    for name, tensor in expected.items():
        own = f"{law} ({name.rsplit('.', 3)[-3:]})"
        require_close(own, found[name].detach(), tensor.detach(), tolerance, least)


def logits(model: nn.Module, batch: dict[str, torch.Tensor], **kwargs) -> torch.Tensor:
    """The output of a forward without gradients."""
    with torch.no_grad():
        return model(**batch, **kwargs).logits


def gradients(
    model: nn.Module, batches: list[dict[str, torch.Tensor]], seed: int, run: Callable | None = None
) -> dict[str, torch.Tensor]:
    """Gradients of trainable parameters of a training pass over batches, by plain name; the model is left in eval.

    Args:
        model: The model.
        batches: What it is trained on.
        seed: Of dropouts and noises.
        run: Makes the passes; None makes a forward and a backward for each batch.
    """
    model.zero_grad()
    model.train()
    torch.manual_seed(seed)
    (run or _one_by_one)(model, batches)
    model.eval()
    return {
        plain_name(name): torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def _one_by_one(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> None:
    for batch in batches:
        model(**batch).loss.backward()
