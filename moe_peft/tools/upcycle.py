"""A trained LoRA as the start of several experts (Nakamura et al., 2025, arXiv 2502.19261, for pairs of matrices).

    copies    every expert is the LoRA; then rho r random rows of each A_e are drawn again, from a normal distribution
              with the mean and deviation of A, and their columns of B_e are zero
    split     expert e has rows e r/E to (e+1) r/E - 1 of the LoRA, and weights of one: sum_e B_e A_e = B A

With rho = 0 the copies equal the LoRA under all weights that sum to one.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from ..layers import routed_layers
from ..messages import shown
from ..methods import RoutedConfig
from ..place import Place
from ..types import TokenContext
from .checks import check_module, check_whole
from .compose import check_places, filled, put_pairs
from .stock_lora import Pair, read_lora


def upcycle(
    base: nn.Module,
    lora: str | Path,
    num_experts: int,
    config: RoutedConfig | None = None,
    *,
    rho: float = 0.0,
    split: bool = False,
    seed: int = 0,
    adapter_name: str = "default",
) -> PeftModel:
    """Put a LoRA on a model as a routed adapter of several experts, to train it further.

    Args:
        base: The base model, without adapters.
        lora: Folder of a LoRA of stock peft, or its name on the Hub.
        num_experts: E.
        config: Router, losses and task type; what follows from the LoRA is left at its default. None takes two experts
            of each token with weights that sum to one, and with `split` all of them with weights of one at the start.
        rho: Share of the rows of each expert's A that are drawn again, from 0 to 1.
        split: Give each expert a part of the rank instead of a copy.
        seed: Of the rows that are drawn.
        adapter_name: Name of the new adapter.

    Returns:
        The adapted model.

    Raises:
        ValueError: There is no plain LoRA, or a number cannot work; with weights that do not sum to one the copies
            would not equal the LoRA. The model is as it was.
    """
    check_module(base, "upcycle", "base")
    check_whole(seed, "upcycle", "seed")
    if not isinstance(split, bool):
        raise ValueError(f"upcycle: split={shown(split)} must be True or False.")
    if not isinstance(num_experts, int) or isinstance(num_experts, bool) or num_experts < 1:
        raise ValueError(f"num_experts={shown(num_experts)} must be a whole number, 1 or more.")
    if isinstance(rho, bool) or not isinstance(rho, (int, float)) or not 0 <= rho <= 1 or (split and rho):
        raise ValueError(f"rho={shown(rho)} must be a number from 0 to 1, and 0 with split=True.")
    found = read_lora(str(lora))
    places = check_places(base, [found])
    uneven = next((place for place, pair in found.pairs.items() if split and pair.rank % num_experts), None)
    if uneven is not None:
        raise ValueError(
            f"num_experts={num_experts} does not divide the rank {found.pairs[uneven].rank} of {uneven}. Take a "
            "number that does, or split=False."
        )
    if config is None:
        config = _default(num_experts, split=split, task_type=found.config.task_type)
    rank = found.rank // num_experts if split else found.rank
    whole = filled(config, places, num_experts, rank)
    _check_weights(whole, num_experts if split else 1)
    model = get_peft_model(base, whole, adapter_name=adapter_name)
    assert isinstance(model, PeftModel)
    generator = torch.Generator().manual_seed(seed)
    make = _parts if split else _copies
    put_pairs(
        model, adapter_name, {place: make(pair, num_experts, rho, generator) for place, pair in found.pairs.items()}
    )
    if split:
        _start_evenly(model, adapter_name)
    return model


def _default(num_experts: int, *, split: bool, task_type: str | None) -> RoutedConfig:
    if split:
        fields = {"router": "dense", "routed_scaling_factor": float(num_experts)}
        return RoutedConfig(num_experts=num_experts, task_type=task_type, **fields)  # type: ignore[arg-type]
    top_k = min(2, num_experts)
    return RoutedConfig(num_experts=num_experts, top_k=top_k, norm_topk_prob=top_k > 1, task_type=task_type)


@torch.no_grad()
def _check_weights(config: RoutedConfig, wanted: float) -> None:
    """Refuse routers whose weights do not sum to what makes the experts the LoRA."""
    place = Place.typical()
    router = config.at(place).build(place).router
    if router is None or router.reads != "input":
        kind = "none" if router is None else router.reads
        raise ValueError(
            f"config: the router reads {shown(kind)}, and a LoRA becomes experts of a router that reads the layer's "
            "input. Choose another router or scorer, and change it afterwards."
        )
    noise_TD = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    sums_T = router(noise_TD, TokenContext()).gate_matrix().sum(-1)
    if not torch.allclose(sums_T, torch.full_like(sums_T, wanted), rtol=0, atol=1e-5):
        raise ValueError(
            f"config: the weights of a token sum to {float(sums_T.min()):g} to {float(sums_T.max()):g}, and the "
            f"experts equal the LoRA where they sum to {wanted:g}. Write "
            + ("norm_topk_prob=True" if wanted == 1 else f"router='dense' with routed_scaling_factor={wanted:g}")
            + ", or leave config out."
        )


def _copies(pair: Pair, num_experts: int, rho: float, generator: torch.Generator) -> list[Pair | None]:
    made: list[Pair | None] = []
    count = round(rho * pair.rank)
    mean, deviation = float(pair.A.mean()), float(pair.A.std(unbiased=pair.A.numel() > 1))
    for _ in range(num_experts):
        rows = torch.randperm(pair.rank, generator=generator)[:count]
        A, B = pair.A.clone(), pair.B.clone()
        A[rows] = (torch.randn(count, A.shape[1], generator=generator) * deviation + mean).to(A)
        B[:, rows] = 0.0
        made.append(Pair(A, B))
    return made


def _parts(pair: Pair, num_experts: int, rho: float, generator: torch.Generator) -> list[Pair | None]:
    rows = zip(pair.A.chunk(num_experts), pair.B.chunk(num_experts, dim=1), strict=True)
    return [Pair(A, B) for A, B in rows]


@torch.no_grad()
def _start_evenly(model: PeftModel, adapter_name: str) -> None:
    """Let every expert have the same score at the start."""
    for layer in routed_layers(model):
        if adapter_name in layer.router:
            for parameter in layer.router[adapter_name].parameters():
                parameter.zero_()
