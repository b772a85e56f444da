"""Expert LoRA adapters in the files of others: stock peft's packing, both ways, and a tensor for each expert.

Stock peft (`LoraConfig(target_parameters=...)`, `ParamWrapper`, peft 0.19.1 and later) keeps the pairs of E experts as
    lora_A.weight (E * r, I)    row    e * r + j  is A[e, j]
    lora_B.weight (O, r * E)    column j * E + e  is B[e, j]
under `<experts>.base_layer` for the first parameter of the module and `<experts>` for the second. A tensor for each
expert is what serving engines load: `<experts>.<e>.gate_proj.lora_A.weight`, and so on.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from ..experts.expert_pairs import MATRICES, ExpertPairs
from ..files import new_folder
from ..layers import AdaptedExperts, RoutedLayer
from ..layers.fused_experts import matrix_names, stored_shape
from ..messages import shown
from ..methods import ExpertLoraConfig
from .beside import further_tensors
from .checks import check_finite_adapter
from .one_rank import of_one_rank
from .projections import PROJECTIONS, projections_of

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
AS_STOCK = "Load it with peft and call moe_peft.accelerate_expert_lora(model)."


def export_expert_lora(model: PeftModel, folder: str, adapter_name: str = "default") -> None:
    """Write an adapter as stock peft's LoRA, which loads and merges to the same model without this package.

    Experts that have no pair get one of zeros, as stock peft has one for each.

    Args:
        model: A model with an adapter of `ExpertLoraConfig`.
        folder: The folder to make, with adapter_config.json and adapter_model.safetensors.
        adapter_name: Which adapter.

    Raises:
        ValueError: The adapter is of another type, or there are files at `folder`.
    """
    config = _config_of(model, adapter_name)
    tensors: dict[str, torch.Tensor] = {}
    linears, parameters, ranks = list[str](), list[str](), dict[str, int]()
    for name, layer in _layers(model, adapter_name):
        if not isinstance(layer, AdaptedExperts):
            tensors |= _linear(name, layer, adapter_name)
            linears.append(name)
            ranks[name] = layer.experts[adapter_name].A.shape[1]
            continue
        names = _in_order(layer, layer.experts[adapter_name])
        for depth, (matrix, parameter) in enumerate(names):
            A, B = _whole(layer, adapter_name, matrix, parameter)
            key = f"{PREFIX}{name}{'.base_layer' * (len(names) - 1 - depth)}"
            tensors[f"{key}.lora_A.weight"] = A.reshape(-1, A.shape[2]).contiguous()
            tensors[f"{key}.lora_B.weight"] = B.permute(2, 1, 0).reshape(B.shape[2], -1).contiguous()
            parameters.append(f"{name}.{parameter}")
            ranks[f"{name}.{parameter}"] = A.shape[1]
    _write(folder, config, tensors | further_tensors(model, adapter_name), linears, parameters, ranks)


def export_per_expert(
    model: PeftModel, folder: str, adapter_name: str = "default", projections: Sequence[str] = PROJECTIONS
) -> None:
    """Write an adapter with tensors for each expert, as serving engines load them: gate and up share A.

    Where ranks differ or the scale is rank-stabilised, which engines do not read, all pairs get the largest rank, with
    the scale in B.

    Args:
        model: A model with an adapter of `ExpertLoraConfig`.
        folder: The folder to make, with adapter_config.json and adapter_model.safetensors.
        adapter_name: Which adapter.
        projections: Names of the gate, up and down matrix of an expert; Mixtral's are w1, w3 and w2.

    Raises:
        ValueError: The adapter is of another type, there are not three names, or there are files at `folder`.
    """
    if len(projections) != 3 or len(set(projections)) != 3:
        raise ValueError(f"projections={shown(projections)} must be three names, of the gate, up and down matrix.")
    config = _config_of(model, adapter_name)
    pairs, scales = dict[str, tuple[torch.Tensor, torch.Tensor]](), dict[str, float]()
    for name, layer in _layers(model, adapter_name):
        bank = layer.experts[adapter_name]
        if isinstance(layer, AdaptedExperts):
            own = dict(_by_expert(name, layer, adapter_name, projections))
        else:
            own = {name: (bank.A[0], bank.B[0].T)}
        pairs |= own
        scales |= dict.fromkeys(own, bank.scaling)
    if config.use_rslora or {len(A) for A, _ in pairs.values()} != {config.r}:
        rank, pairs = of_one_rank({name: (A, scales[name] * B) for name, (A, B) in pairs.items()})
        # The configuration of all pairs, whose scale is one.
        config = dataclasses.replace(
            config, r=rank, lora_alpha=rank, use_rslora=False, rank_pattern=None, per_layer=None
        )
    tensors = {
        f"{PREFIX}{name}.lora_{factor}.weight": own.detach().clone().contiguous()
        for name, pair in pairs.items()
        for factor, own in zip("AB", pair, strict=True)
    }
    _write(folder, config, tensors | further_tensors(model, adapter_name), [*pairs], [], {})


def _by_expert(
    name: str, layer: AdaptedExperts, adapter_name: str, projections: Sequence[str]
) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Name of each matrix of each expert that has a pair, with A (r, in) and B (out, r)."""
    experts, bank = layer.get_base_layer(), layer.experts[adapter_name]
    ids = layer.selections[adapter_name].ids if adapter_name in layer.selections else range(bank.num_experts)
    for matrix in bank.matrices:
        A, B = bank.pair(matrix)
        for place, expert in enumerate(ids):
            for projection, part in projections_of(experts, matrix, B[place].T, projections):
                yield f"{name}.{expert}.{projection}", (A[place], part)


def import_expert_lora(base: nn.Module, folder: str, adapter_name: str = "default") -> PeftModel:
    """Put a stock peft LoRA adapter on a model as an adapter of `ExpertLoraConfig`.

    Args:
        base: The base model, without adapters.
        folder: Local folder of the stock adapter.
        adapter_name: Name of the new adapter.

    Returns:
        The adapted model.

    Raises:
        ValueError: The folder's adapter is no LoRA on the experts of this model, or has scales or ranks that an
            adapter here cannot have. The model is as it was.
    """
    stock, tensors = PeftConfig.from_pretrained(folder), load_file(Path(folder) / WEIGHTS)
    if not isinstance(stock, LoraConfig) or not stock.target_parameters:
        raise ValueError(f"{shown(folder)} holds no LoRA with target_parameters, so there is nothing to import.")
    if {*(stock.alpha_pattern or {}).values()} - {stock.lora_alpha}:
        raise ValueError(
            f"The adapter in {shown(folder)} has scales of several sizes (alpha_pattern), for which an adapter here "
            f"has one lora_alpha. {AS_STOCK}"
        )
    leaves = {name.rpartition(".")[2] for name in stock.target_parameters}
    linears = stock.target_modules or None
    config = ExpertLoraConfig(
        r=stock.r,
        lora_alpha=stock.lora_alpha,
        use_rslora=stock.use_rslora,
        task_type=stock.task_type,
        rank_pattern={name: r for name, r in _ranks(base, tensors, folder).items() if r != stock.r} or None,
        target_matrices=[m for m in MATRICES if ("down_proj" in leaves if m == "down" else leaves - {"down_proj"})],
        target_modules=sorted(linears) if isinstance(linears, (set, list)) else linears,
    )
    model = get_peft_model(base, config, adapter_name=adapter_name)
    assert isinstance(model, PeftModel)
    try:
        _fill_all(model, adapter_name, tensors, folder)
    except ValueError:
        model.unload()
        raise
    return model


def _ranks(base: nn.Module, tensors: Mapping[str, torch.Tensor], folder: str) -> dict[str, int]:
    """Module -> rank of its pairs in a stock file, as the shapes tell; wrappers of one module share its rank."""
    modules, ranks = dict(base.named_modules()), dict[str, int]()
    for key, tensor in tensors.items():
        inner, dot, _ = key.removeprefix(PREFIX).partition(".lora_A.weight")
        name = re.sub(r"(\.base_layer)+$", "", inner)
        if not dot or name not in modules:
            continue
        names = matrix_names(modules[name])
        count = 1 if names is None else stored_shape(modules[name], names[0])[0]
        rank = tensor.shape[0] // count
        if ranks.setdefault(name, rank) != rank:
            raise ValueError(
                f"The adapter in {shown(folder)} has pairs of ranks {ranks[name]} and {rank} on the matrices of "
                f"{shown(name)}, for which an adapter here has one rank (rank_pattern). {AS_STOCK}"
            )
    return ranks


def _fill_all(model: PeftModel, adapter_name: str, tensors: dict[str, torch.Tensor], folder: str) -> None:
    """Copy a stock file's tensors into an adapter that has a place for each.

    Raises:
        ValueError: Some have no place, or a place has none.
    """
    used: set[str] = set()
    for name, layer in _layers(model, adapter_name):
        if isinstance(layer, AdaptedExperts):
            used |= _fill(name, layer, adapter_name, tensors)
            continue
        keys = [f"{PREFIX}{name}.lora_{factor}.weight" for factor in "AB"]
        missing = sorted(set(keys) - set(tensors))
        if missing:
            raise ValueError(f"The adapter in {shown(folder)} lacks tensors for {shown(name)}: {shown(missing)}.")
        layer.experts[adapter_name].A.data[0].copy_(tensors[keys[0]])
        layer.experts[adapter_name].B.data[0].copy_(tensors[keys[1]].T)
        used |= set(keys)
    if used != set(tensors):
        left = sorted(set(tensors) - used)
        raise ValueError(f"The adapter in {shown(folder)} has tensors of other places than the model: {shown(left)}.")


def _config_of(model: PeftModel, adapter_name: str) -> ExpertLoraConfig:
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(config, ExpertLoraConfig):
        known = sorted(getattr(model, "peft_config", {}))
        raise ValueError(
            f"adapter_name={shown(adapter_name)} is no adapter of ExpertLoraConfig; the model's adapters are {known}."
        )
    check_finite_adapter(model, adapter_name, "The export")
    return config


def _layers(model: PeftModel, adapter_name: str) -> list[tuple[str, RoutedLayer]]:
    """The adapter's layers by the names that the base model has for what they wrap."""
    named = model.get_base_model().named_modules()
    return [(name, m) for name, m in named if isinstance(m, RoutedLayer) and adapter_name in m.experts]


def _in_order(layer: AdaptedExperts, bank: ExpertPairs) -> list[tuple[str, str]]:
    """Matrices with pairs and the parameters that hold them, in the order in which stock peft wraps them."""
    experts = layer.get_base_layer()
    names = matrix_names(experts)
    assert names is not None
    own = [(m, n) for m, n in zip(MATRICES, names, strict=True) if m in bank.matrices]
    order = [name for name, _ in experts.named_parameters(recurse=False)]
    return sorted(own, key=lambda pair: order.index(pair[1]) if pair[1] in order else len(order))


def _whole(layer: AdaptedExperts, adapter_name: str, matrix: str, parameter: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of all stored experts, zeros where there is none."""
    bank, stored = layer.experts[adapter_name], stored_shape(layer.get_base_layer(), parameter)[0]
    chosen = layer.selections.get(adapter_name)
    ids = list(range(bank.num_experts) if chosen is None else chosen.ids)
    whole = []
    for own in bank.pair(matrix):
        full = own.new_zeros(stored, *own.shape[1:])
        full[ids] = own.detach()
        whole.append(full)
    return whole[0], whole[1]


def _linear(name: str, layer: RoutedLayer, adapter_name: str) -> dict[str, torch.Tensor]:
    bank = layer.experts[adapter_name]
    return {
        f"{PREFIX}{name}.lora_A.weight": bank.A[0].detach().clone(),
        f"{PREFIX}{name}.lora_B.weight": bank.B[0].T.detach().clone().contiguous(),
    }


def _fill(name: str, layer: AdaptedExperts, adapter_name: str, tensors: dict[str, torch.Tensor]) -> set[str]:
    """Copy stock tensors into a layer's pairs; the keys that were read."""
    bank, used = layer.experts[adapter_name], set()
    names = _in_order(layer, bank)
    for depth, (matrix, parameter) in enumerate(names):
        key = f"{PREFIX}{name}{'.base_layer' * (len(names) - 1 - depth)}"
        stored = stored_shape(layer.get_base_layer(), parameter)[0]
        A, B = bank.pair(matrix)
        wanted = (stored * bank.r, A.shape[2]), (B.shape[2], bank.r * stored)
        found = [tensors.get(f"{key}.lora_{factor}.weight") for factor in "AB"]
        if any(t is None or tuple(t.shape) != shape for t, shape in zip(found, wanted, strict=True)):
            shapes = [None if t is None else tuple(t.shape) for t in found]
            raise ValueError(
                f"{key}: stock tensors of the shapes {wanted} are expected, and {shapes} were found. Adapters of peft "
                "below 0.19.1 have A on the other side: train again, or convert them with peft first."
            )
        count = bank.num_experts
        A.data.copy_(found[0].view(stored, bank.r, -1)[:count])  # type: ignore[union-attr]
        B.data.copy_(found[1].view(B.shape[2], bank.r, stored).permute(2, 1, 0)[:count])  # type: ignore[union-attr]
        used |= {f"{key}.lora_A.weight", f"{key}.lora_B.weight"}
    return used


def _write(
    folder: str,
    config: ExpertLoraConfig,
    tensors: dict[str, torch.Tensor],
    linears: list[str],
    parameters: list[str],
    ranks: dict[str, int],
) -> None:
    stock = LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
        use_rslora=config.use_rslora,
        task_type=config.task_type,
        target_modules=linears,
        target_parameters=parameters or None,
        rank_pattern={name: rank for name, rank in ranks.items() if rank != config.r},
        modules_to_save=config.modules_to_save,
        trainable_token_indices=config.trainable_token_indices,
        inference_mode=True,
        base_model_name_or_path=config.base_model_name_or_path,
    )
    with new_folder(folder) as growing:
        stock.save_pretrained(str(growing))
        save_file(tensors, growing / WEIGHTS, metadata={"format": "pt"})
