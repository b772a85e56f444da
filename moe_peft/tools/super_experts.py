"""Experts of a backbone on which it hangs: those whose down projection gives extreme values (arXiv 2507.23279).

    super:  m_e > the 99.5th percentile of all m,  and  m_e > max(m) / 10,    m_e = max |w2_e act(...)| over the tokens

Pruning one breaks the model, and training or quantizing one should be done with care.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..backbone.expert_tensors import expert_tensors, keeps_slices, run_experts
from ..backbone.experts_call import experts_call
from ..backbone.structure import base_of
from ..messages import shown, warn
from ..place import MoeLayer
from ..selection.scoring import evaluating, model_inputs, sparse_layers
from .checks import check_finite, check_module, listed_batches

PERCENTILE, SHARE = 99.5, 0.1


@dataclass(frozen=True)
class SuperExperts:
    """What was found.

    Attributes:
        largest: Layer -> (E,) largest output of each expert, float64; zero for experts that no token used.
        experts: Layer -> ids of those that are extreme; layers without one are left out.
    """

    largest: dict[int, torch.Tensor]
    experts: dict[int, list[int]]

    def among(self, chosen: Mapping[Any, Iterable[int]]) -> dict[int, list[int]]:
        """Which of some experts are extreme.

        Args:
            chosen: Layer -> experts that are to be trained, pruned or quantized, as in an `ExpertSelection.experts`.
        """
        own = {int(layer): set(ids) for layer, ids in chosen.items()}
        found = {layer: [e for e in ids if e in own.get(layer, ())] for layer, ids in self.experts.items()}
        return {layer: ids for layer, ids in found.items() if ids}

    def warn_of(self, chosen: Mapping[Any, Iterable[int]], purpose: str = "training") -> dict[int, list[int]]:
        """Warn where some of the experts that are chosen are extreme.

        Args:
            chosen: See `among`.
            purpose: What is to be done with them.

        Returns:
            Those that are.
        """
        found = self.among(chosen)
        if found:
            warn(
                f"{sum(map(len, found.values()))} of the experts chosen for {purpose} give extreme outputs "
                f"({shown(found)}: layer to experts), on which the model hangs. Leave them out, or compare "
                "the model's perplexity on texts of another kind before and after."
            )
        return found


def super_experts(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    percentile: float = PERCENTILE,
    share: float = SHARE,
) -> SuperExperts:
    """Find the experts of a backbone whose outputs are extreme on some texts.

    Args:
        model: A mixture of experts, wrapped or not, quantized by this package or not.
        batches: Texts, as dicts of tensors; a few dozen sequences are enough.
        percentile: An expert's largest output must exceed this percentile of all experts'; the paper's 99.5.
        share: And this share of the largest of all; the paper's 0.1.

    Raises:
        TypeError: The model is no module.
        ValueError: A number cannot work, there is no batch, the model has no experts that can be run one by one, or
            an output of one is not finite.
    """
    for name, value, top in (("percentile", percentile, 100), ("share", share, 1)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= top:
            raise ValueError(f"super_experts: {name}={shown(value)} must be a number from 0 to {top}.")
    check_module(model, "super_experts")
    batches = listed_batches(batches, "super_experts")
    layers = sparse_layers(model)
    for layer in layers:
        if not keeps_slices(base_of(model.get_submodule(layer.experts)), layer.num_experts):
            raise ValueError(f"super_experts: {layer.experts} keeps its experts in a form that cannot be run alone.")
    largest = {layer.index: torch.zeros(layer.num_experts, dtype=torch.float64) for layer in layers}
    handles = [
        model.get_submodule(layer.experts).register_forward_pre_hook(_watch(model, layer, largest), with_kwargs=True)
        for layer in layers
    ]
    device = next(parameter.device for parameter in model.parameters() if not parameter.is_meta)
    try:
        with evaluating(model):
            for batch in batches:
                model(**model_inputs(model, batch, device))
    finally:
        for handle in handles:
            handle.remove()
    if not any(bool(own.any()) for own in largest.values()):
        raise ValueError("super_experts: there is no batch. Give texts as dicts of tensors.")
    return SuperExperts(largest, extreme(largest, percentile, share))


def extreme(largest: Mapping[int, torch.Tensor], percentile: float, share: float) -> dict[int, list[int]]:
    """The rule itself.

    Args:
        largest: Layer -> (E,) largest outputs.
        percentile: From 0 to 100.
        share: From 0 to 1.
    """
    everything = torch.cat(list(largest.values()))
    bound = torch.quantile(everything, percentile / 100)
    peak = share * everything.max()
    found = {layer: ((own > bound) & (own > peak)).nonzero().flatten().tolist() for layer, own in largest.items()}
    return {layer: ids for layer, ids in found.items() if ids}


def _watch(model: nn.Module, layer: MoeLayer, largest: dict[int, torch.Tensor]) -> Any:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        call, experts = experts_call(args, kwargs), base_of(module)
        x_TD, E = call.hidden.reshape(-1, call.hidden.shape[-1]), layer.num_experts
        rows, slots = (call.index < E).nonzero(as_tuple=True)
        used = call.index[rows, slots].long()
        tensors = expert_tensors(experts, E)
        out_NO = run_experts(experts, tensors, E, x_TD[rows], used[:, None], x_TD.new_ones(len(rows), 1))
        peaks_N = out_NO.abs().amax(-1).double().cpu()
        check_finite(
            peaks_N,
            f"super_experts: outputs of experts at {layer.experts}",
            "Weights of the model are broken, or its activations overflow: load it with dtype=torch.bfloat16 or "
            "float32.",
        )
        own = largest[layer.index]
        own.scatter_reduce_(0, used.cpu(), peaks_N, reduce="amax")

    return hook
