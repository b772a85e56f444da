"""Scores a backbone's experts on samples of a task, in forward passes alone (ESFT, arXiv 2407.01906, section 3).

The scores come from what the experts modules are called with, the experts and weights that the backbone really uses;
`scores.py` has the formulas.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import distributed as dist
from torch import nn
from tqdm import tqdm

from ..backbone.expert_tensors import expert_tensors
from ..backbone.experts_call import experts_call
from ..backbone.sizes import num_base_weights
from ..backbone.structure import base_of, find_moe_layers, unsupported_reason
from ..forward.processes import num_processes
from ..messages import shown
from ..place import MoeLayer
from .scores import ExpertScores
from .tally import MASKS, ExpertTally, scored_tokens

# What packed batches tell an attention implementation, which a forward takes without naming it.
OF_PACKED_ROWS = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
NOT_FOR_THE_MODEL = ("labels", "completion_mask")


def score_experts(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    *,
    max_tokens: int | None = None,
    score_mask: str = "all",
    show_progress: bool = True,
) -> ExpertScores:
    """Measure how much samples of a task use each expert of a mixture-of-experts model.

    The model runs in eval mode without gradients and is left as it was. Both criteria and both aggregates are
    measured at once; `select_experts` chooses between them. With torch.distributed every process scores its own
    batches, and all get the joint scores.

    Args:
        model: A mixture-of-experts model of transformers, quantized or not, or a `PeftModel` around it, whose active
            adapters take part unless they are disabled.
        dataloader: Batches as dicts of tensors, from a DataLoader, a list or any iterable: `input_ids`, with
            `attention_mask` where there is padding on either side, or `position_ids`, `seq_idx` or `cu_seq_lens_q`
            where rows are packed. Columns that the model does not take are ignored.
        max_tokens: Stop after this many tokens, over all processes; the authors take 131,072. None takes all batches.
        score_mask: "all" scores every token but padding; "completion" only the tokens of completions, which
            `completion_mask` marks, or `labels` other than -100.
        show_progress: Whether to show a progress bar.

    Returns:
        Scores by layer.

    Raises:
        ValueError: The model has no experts or keeps them in a form that is not supported, a batch does not tell what
            was asked for, or there is no token to score.
    """
    _check_arguments(model, dataloader, score_mask, max_tokens, show_progress)
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    layers = sparse_layers(model)
    device = next(parameter.device for parameter in model.parameters() if not parameter.is_meta)
    limit, tally = _own_share(max_tokens), ExpertTally(layers)
    with (
        evaluating(model),
        watching(model, layers) as seen,
        tqdm(total=limit, desc="Scoring the experts", unit="token", disable=not show_progress) as progress,
    ):
        for batch in dataloader:
            if not isinstance(batch, Mapping):
                raise ValueError(
                    f"A batch is a {type(batch).__name__}, not a dict of tensors. Give batches as "
                    "{'input_ids': ..., 'attention_mask': ...}."
                )
            batch = with_positions(batch)
            left = None if limit is None else limit - tally.num_tokens
            tokens = scored_tokens(_on_cpu(batch), score_mask, left)
            seen.clear()
            model(**model_inputs(model, batch, device))
            for layer, (index_TK, weights_TK) in _fetch(seen, layers, len(tokens.counts)).items():
                tally.add(layer, index_TK, weights_TK, tokens)
            before = tally.num_tokens
            tally.add_tokens(tokens)
            progress.update(tally.num_tokens - before)
            if limit is not None and tally.num_tokens >= limit:
                break
    tally.join(device)
    if tally.num_tokens == 0:
        raise ValueError(
            "There is no token to score: the data loader is empty, or every token is padding or outside the "
            f"completions (score_mask={shown(score_mask)})."
        )
    by_layer = {layer.index: tally.scores(layer.index, expert_size(model, layer)) for layer in layers}
    return ExpertScores(by_layer, tally.num_tokens, tally.num_samples, num_base_weights(model))


def _check_arguments(model: Any, dataloader: Any, score_mask: Any, max_tokens: Any, show_progress: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model={shown(model)} is no model. Load it first, as in AutoModelForCausalLM.from_pretrained(name)."
        )
    if isinstance(dataloader, (Mapping, str)) or not isinstance(dataloader, Iterable):
        raise ValueError(
            f"dataloader={shown(dataloader)} must be a DataLoader or a list of batches; write [batch] for a "
            "single one."
        )
    if score_mask not in MASKS:
        raise ValueError(f"score_mask={shown(score_mask)} must be one of {MASKS}.")
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < num_processes()):
        raise ValueError(
            f"max_tokens={shown(max_tokens)} must be a whole number of at least 1 for each process, or None for all "
            "tokens."
        )
    if not isinstance(show_progress, bool):
        raise ValueError(f"show_progress={shown(show_progress)} must be True or False.")


def sparse_layers(model: nn.Module) -> list[MoeLayer]:
    """The layers whose experts can be scored.

    Args:
        model: Any model.

    Raises:
        ValueError: There is none, or the model keeps its experts in a form that is not supported.
    """
    reason = unsupported_reason(model)
    if reason is not None:
        raise ValueError(reason)
    layers = find_moe_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} is a dense model: it has no experts to score. Score a mixture-of-experts "
            "backbone; for a dense one use an adapter that brings its own experts."
        )
    indices = [layer.index for layer in layers]
    if len(set(indices)) < len(indices):
        raise ValueError(
            f"{type(model).__name__} has several expert modules in one layer, which its index does not tell apart."
        )
    return layers


def expert_size(model: nn.Module, layer: MoeLayer) -> int:
    """Number of parameters of one expert of a layer, biases included; quantized weights count as weights."""
    base = base_of(model.get_submodule(layer.experts))
    return sum(math.prod(tensor.shape[1:]) for tensor in expert_tensors(base, layer.num_experts).values())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module's own mode is restored, after an error too."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def watching(model: nn.Module, layers: Iterable[MoeLayer]) -> Iterator[dict[int, list[torch.Tensor]]]:
    """Collect what the experts modules are called with.

    Args:
        model: The model.
        layers: Its sparse layers.

    Yields:
        Layer -> (2, T, K) experts and weights of each call, on the layer's device and in float64, which holds both
        exactly.
    """
    seen: dict[int, list[torch.Tensor]] = {}

    def watch(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            call = experts_call(args, kwargs)
            # Apple's devices have no float64.
            dtype = torch.float32 if call.weights.device.type == "mps" else torch.float64
            seen.setdefault(layer, []).append(torch.stack([call.index.to(dtype), call.weights.to(dtype)]))

        return hook

    handles = [
        model.get_submodule(layer.experts).register_forward_pre_hook(watch(layer.index), with_kwargs=True)
        for layer in layers
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _fetch(
    seen: dict[int, list[torch.Tensor]], layers: Iterable[MoeLayer], num_tokens: int
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Bring the routing of all layers to the CPU in one transfer: layer -> (T, K) experts and weights."""
    shapes, flat = {}, []
    for layer in layers:
        called = torch.cat(seen.get(layer.index) or [torch.empty(2, 0, 1)], dim=1)
        if called.shape[1] != num_tokens:
            raise ValueError(
                f"{layer.experts} received {called.shape[1]} tokens in a batch of {num_tokens} with padding, so they "
                "cannot be told apart. Score batches without prompts that an adapter adds, with every layer active."
            )
        shapes[layer.index] = called.shape
        flat.append(called.reshape(-1))
    fetched = torch.cat([own.to(flat[0].device) for own in flat]).cpu().double()
    parts = fetched.split([own.numel() for own in flat])
    both = {layer: part.view(shape) for (layer, shape), part in zip(shapes.items(), parts, strict=True)}
    return {layer: (part[0].long(), part[1]) for layer, part in both.items()}


def with_positions(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a batch of joined documents that only says where each begins (`cu_seq_lens_q`) by `position_ids`."""
    starts, ids = batch.get("cu_seq_lens_q"), batch.get("input_ids")
    if starts is None or ids is None or batch.get("position_ids") is not None:
        return dict(batch)
    positions_T = torch.arange(ids.numel(), device=ids.device)
    starts = starts.to(ids.device).long()
    document_T = torch.searchsorted(starts, positions_T, right=True) - 1
    return {**batch, "position_ids": (positions_T - starts[document_T]).view(ids.shape)}


def model_inputs(model: nn.Module, batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The columns that a model's forward takes, on its device; without labels, as no loss is needed.

    Args:
        model: The model, or a `PeftModel` around it.
        batch: Columns by name.
        device: Where the model is.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    base = extract_model_from_parallel(base, keep_torch_compile=False)  # a compiled one names no arguments
    known = inspect.signature(type(base).forward).parameters
    names = set(known) - set(NOT_FOR_THE_MODEL)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        names |= set(OF_PACKED_ROWS)
    inputs = {name: value for name, value in batch.items() if name in names and value is not None}
    inputs = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    # Neither a cache nor the logits of every token are needed, and both are large.
    spare = {"use_cache": False, "logits_to_keep": 1}
    return {**inputs, **{name: value for name, value in spare.items() if name in known}}


def _on_cpu(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.cpu() for name, value in batch.items() if isinstance(value, torch.Tensor)}


def _own_share(max_tokens: int | None) -> int | None:
    """How many of the tokens this process scores."""
    if max_tokens is None or num_processes() == 1:
        return max_tokens
    return max_tokens // num_processes() + (dist.get_rank() < max_tokens % num_processes())
