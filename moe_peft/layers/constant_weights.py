"""What merging asks of a router: the same weights for every input; and of a base layer: a weight of its own."""

from __future__ import annotations

import torch
from peft.utils.quantization_utils import QuantizationBackend
from torch import nn

from ..messages import shown
from ..routers import Router
from ..types import TokenContext


@torch.no_grad()
def constant_weights(router: Router, in_features: int) -> torch.Tensor:
    """The weights that a mergeable router gives every token outside of training.

    Args:
        router: A router that promises to be `mergeable`.
        in_features: Width of its input.

    Returns:
        (E,) weights.
    """
    parameter = next(router.parameters(), None)
    dtype = torch.float64 if parameter is not None and parameter.dtype == torch.float64 else torch.float32
    return _weights(router, torch.zeros(1, in_features, dtype=dtype, device=_device(router)))[0]


@torch.no_grad()
def check_constant(router: Router, in_features: int, adapter_name: str, place: str) -> None:
    """Refuse a router whose weights differ between inputs, whatever it promises.

    Args:
        router: A router that promises to be `mergeable`.
        in_features: Width of its input.
        adapter_name: Its adapter, for the message.
        place: Where it is, for the message.

    Raises:
        ValueError: They differ, or are no finite numbers.
    """
    # Inputs of several sizes; a generator of its own leaves the random numbers of training as they are.
    noise_TD = torch.randn(4, in_features, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[0.0], [1], [3], [9]]
    )
    weights_TE = _weights(router, noise_TD.to(_device(router)))
    if not torch.isfinite(weights_TE).all():
        raise ValueError(
            f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken: its router at "
            f"{place} holds values that are not finite. Load it again from its file."
        )
    if not torch.equal(weights_TE, weights_TE[:1].expand_as(weights_TE)):
        raise ValueError(
            f"The adapter {shown(adapter_name)} depends on the input of {place}, although its router "
            f"({type(router).__name__}) says that it is mergeable, so no fixed weight equals it and it cannot be "
            "merged. Keep it as an adapter, and let the router say mergeable = False."
        )


def check_weight(base: nn.Module, backend: QuantizationBackend | None, place: str) -> None:
    """Refuse a base layer whose weight is computed, or cannot be read or written.

    Args:
        base: The base layer.
        backend: What reads and writes its weight where it is quantized.
        place: Where it is, for the message.

    Raises:
        ValueError: It is one of these.
    """
    if backend is not None and not backend.supports_merge:
        raise ValueError(
            f"{place} ({type(base).__name__}) is quantized in a form that peft does not merge into. Load the "
            "base model in 16 or 32 bit to merge."
        )
    if backend is None and not isinstance(base._parameters.get("weight"), nn.Parameter):
        raise ValueError(
            f"The weight of {place} ({type(base).__name__}) is computed from others in each call, as by "
            "torch.nn.utils.parametrize, so nothing can be merged into it. Remove the parametrization to merge."
        )


def _weights(router: Router, x_TD: torch.Tensor) -> torch.Tensor:
    return router(x_TD, TokenContext()).gate_matrix()


def _device(router: Router) -> torch.device:
    return next((tensor.device for tensor in router.parameters()), torch.device("cpu"))
