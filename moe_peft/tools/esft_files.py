"""ESFT adapters in their authors' files (Wang et al., 2024, arXiv 2407.01906; deepseek-ai/ESFT), both ways.

    expert_cfg.json    {"experts": {"1": [8, 26]}, "shared_experts": false, "non_expert_modules": false}
    *.safetensors      [model.]layers.{l}.mlp.experts.{e}.{gate,up,down}_proj.weight, and for all tokens' experts
                       [model.]layers.{l}.mlp.shared_experts.{gate,up,down}_proj.weight

Here gate_up_proj[n] = [gate; up] of the n-th selected expert, in ascending order of their ids.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn

from ..backbone.structure import base_of, find_moe_layers
from ..config.adapter_files import is_finite, read_header
from ..experts.expert_pairs import MATRICES
from ..files import check_free, new_folder
from ..layers import routed_layers
from ..layers.fused_experts import matrix_names, stored_shape
from ..messages import shown
from ..methods import EsftConfig
from ..place import MoeLayer
from ..selection import ExpertSelection
from .checks import check_finite_adapter
from .projections import PROJECTIONS, joined, projections_of

SELECTION = "expert_cfg.json"
KEY = re.compile(
    r"(?:model\.)?layers\.(?P<layer>\d+)\.mlp\."
    r"(?:experts\.(?P<expert>\d+)|shared_experts)\.(?P<projection>gate_proj|up_proj|down_proj)\.weight"
)
# Layer, expert or None for those of all tokens, projection.
Part = tuple[int, int | None, str]


def export_esft(
    model: PeftModel, folder: str | Path, adapter_name: str = "default", *, max_shard_size: int | str = "5GB"
) -> None:
    """Write an adapter in the authors' form.

    Args:
        model: A model with an adapter of `EsftConfig`, whose base weights may be on the meta device.
        folder: The folder to make.
        adapter_name: Which adapter.
        max_shard_size: Bytes of a file, or text as "5GB".

    Raises:
        ValueError: The adapter is of another type or trains what the form has no place for, or there are files at
            `folder`; nothing has been written.
    """
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(config, EsftConfig) or config.expert_adapter != "full":
        raise ValueError(
            f"adapter_name={shown(adapter_name)} is no adapter of EsftConfig with whole experts, which the authors' "
            "form holds. Save it with model.save_pretrained(folder)."
        )
    base = model.get_base_model()
    layers = {layer.experts: layer for layer in find_moe_layers(base)}
    shared = [name for layer in layers.values() for name in layer.shared_experts]
    other = [name for name in config.modules_to_save or [] if name not in shared]
    if other:
        raise ValueError(f"The authors' form has no place for {shown(other[0])}, which the adapter trains as well.")
    check_free(folder)
    check_finite_adapter(model, adapter_name, "export_esft")
    tensors: dict[str, torch.Tensor] = {}
    for own in routed_layers(model):
        if adapter_name in own.experts:
            tensors |= _expert_tensors(own, adapter_name, layers[own.place].index)
            if config.train_shared_experts:
                tensors |= _shared_tensors(base, layers[own.place], adapter_name)
    selection = ExpertSelection(dict(config.experts or {}), shared_experts=config.train_shared_experts)
    with new_folder(folder) as growing:
        selection.save(growing / SELECTION)
        save_torch_state_dict(tensors, growing, max_shard_size=max_shard_size)


def _expert_tensors(layer: Any, adapter_name: str, index: int) -> dict[str, torch.Tensor]:
    experts, bank = layer.get_base_layer(), dict(layer.experts[adapter_name].named_parameters())
    names = _matrices(layer.place, experts, bank)
    transposed = bool(getattr(experts, "is_transposed", False))
    tensors = {}
    for place, expert in enumerate(layer.selections[adapter_name]):
        for matrix, name in names.items():
            own = bank[name][place].detach()
            for projection, rows in projections_of(experts, matrix, own.T if transposed else own):
                key = f"model.layers.{index}.mlp.experts.{expert}.{projection}.weight"
                tensors[key] = rows.cpu().clone().contiguous()
    return tensors


def _shared_tensors(base: nn.Module, layer: MoeLayer, adapter_name: str) -> dict[str, torch.Tensor]:
    tensors = {}
    for name in layer.shared_experts:
        wrapper: Any = base.get_submodule(name)
        saved = wrapper.modules_to_save[adapter_name]
        for key, own in saved.state_dict().items():
            tensors[f"model.layers.{layer.index}.mlp.shared_experts.{key}"] = own.detach().cpu().clone()
    return tensors


def _matrices(place: str, experts: nn.Module, tensors: Mapping[str, object] | None = None) -> dict[str, str]:
    """The fused matrices by what they are, of experts that the form can hold."""
    names = matrix_names(experts)
    more = [] if names is None or tensors is None else sorted(set(tensors) - set(names))
    if names is None or more or getattr(experts, "has_bias", False):
        raise ValueError(
            f"The authors' form has a gate, an up and a down matrix for each expert, and {place} "
            f"({type(experts).__name__}) has others. Save the adapter with model.save_pretrained(folder)."
        )
    return dict(zip(MATRICES, names, strict=True))


def import_esft(base: Any, folder: str | Path, adapter_name: str = "default") -> PeftModel:
    """Put an adapter in the authors' form on a model, as an adapter of `EsftConfig`.

    Args:
        base: The base model, without adapters; on the meta device it is given the adapter alone.
        folder: Local folder with expert_cfg.json and one or more safetensors files.
        adapter_name: Name of the new adapter.

    Returns:
        The adapted model.

    Raises:
        ValueError: The folder lacks a tensor or has one more than its configuration says, or one of another shape
            than the model's. The model is as it was.
    """
    folder = Path(folder)
    selection = ExpertSelection.load(folder / SELECTION)
    files = _parts(folder)
    config = EsftConfig(
        experts={layer: ids for layer, ids in selection.experts.items() if ids},
        train_shared_experts=selection.shared_experts,
        task_type="CAUSAL_LM",
    )
    layers = {layer.index: layer for layer in find_moe_layers(base)}
    chosen = config.selected_layers(list(layers.values()))
    shapes: dict[Part, tuple[int, ...]] = {}
    for layer in chosen:
        shapes |= _wanted(base, layer, selection)
    _compare(folder, shapes, files)
    wrong = [key for path, key in files.values() if not is_finite(_read((path, key)))]
    if wrong:
        raise ValueError(
            f"{folder} holds NaN or infinite values in {len(wrong)} tensors: {shown(wrong)}. Take it from an earlier "
            "checkpoint. Nothing has been changed."
        )
    model = get_peft_model(base, config, adapter_name=adapter_name)
    assert isinstance(model, PeftModel)
    for layer in chosen:
        _fill(model, layer, files, adapter_name)
    return model


def _parts(folder: Path) -> dict[Part, tuple[Path, str]]:
    """Where each tensor of a folder lies: its file and key."""
    found: dict[Part, tuple[Path, str]] = {}
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ValueError(f"{folder} holds no safetensors files beside {SELECTION}.")
    for path in paths:
        for key in read_header(path).shapes:
            match = KEY.fullmatch(key)
            if match is None:
                raise ValueError(
                    f"{path} holds {shown(key)}, which is no matrix of an expert. An adapter that trains more than "
                    "experts has no equal form here."
                )
            expert = None if match["expert"] is None else int(match["expert"])
            part = (int(match["layer"]), expert, match["projection"])
            if part in found:
                raise ValueError(f"{path} and {found[part][0]} both hold {shown(key)}. Take one of the two away.")
            found[part] = (path, key)
    return found


def _wanted(base: nn.Module, layer: MoeLayer, selection: ExpertSelection) -> dict[Part, tuple[int, ...]]:
    """Shape of every tensor that a layer needs."""
    experts = base_of(base.get_submodule(layer.experts))
    transposed = bool(getattr(experts, "is_transposed", False))
    shapes: dict[Part, tuple[int, ...]] = {}
    for matrix, name in _matrices(layer.experts, experts).items():
        one = torch.empty(stored_shape(experts, name)[1:], device="meta")
        for projection, rows in projections_of(experts, matrix, one.T if transposed else one):
            for expert in selection.experts[str(layer.index)]:
                shapes[layer.index, expert, projection] = tuple(rows.shape)
    if selection.shared_experts:
        for name in layer.shared_experts:
            for key, own in base.get_submodule(name).state_dict().items():
                shapes[layer.index, None, key.removesuffix(".weight")] = tuple(own.shape)
    return shapes


def _compare(folder: Path, wanted: Mapping[Part, tuple[int, ...]], files: Mapping[Part, tuple[Path, str]]) -> None:
    lost, left = sorted(map(str, wanted.keys() - files)), sorted(map(str, files.keys() - wanted))
    if lost or left:
        what = f"lacks (layer, expert, projection) {lost[0]}" if lost else f"has {left[0]} more than {SELECTION} says"
        raise ValueError(
            f"{folder} {what} ({len(lost)} lacking, {len(left)} more): it is not whole, of another base model, or the "
            "selection is not the one that it was trained with. Nothing has been changed."
        )
    headers = {path: read_header(path).shapes for path, _ in files.values()}
    for part, shape in wanted.items():
        path, key = files[part]
        if headers[path][key] != shape:
            raise ValueError(
                f"{path} holds {shown(key)} of shape {headers[path][key]}, and the model's is {shape}: the adapter is "
                "of another base model. Nothing has been changed."
            )


@torch.no_grad()
def _fill(model: PeftModel, layer: MoeLayer, files: Mapping[Part, tuple[Path, str]], adapter_name: str) -> None:
    """Read a layer's tensors into the places that the adapter has for them."""
    base = model.get_base_model()
    own: Any = base.get_submodule(layer.experts)
    experts, bank = own.get_base_layer(), own.experts[adapter_name]
    transposed = bool(getattr(experts, "is_transposed", False))
    for matrix, name in _matrices(layer.experts, experts).items():
        stack = []
        for expert in own.selections[adapter_name]:
            parts = {part[2]: place for part, place in files.items() if part[:2] == (layer.index, expert)}
            fused = joined(experts, matrix, {key: _read(parts[key]) for key in PROJECTIONS if key in parts})
            stack.append(fused.T if transposed else fused)
        _put(bank, name, torch.stack(stack))
    for name in layer.shared_experts:
        wrapper: Any = base.get_submodule(name)
        for part, place in files.items():
            if part[:2] == (layer.index, None):
                saved = wrapper.modules_to_save[adapter_name].get_submodule(part[2])
                _put(saved, "weight", _read(place))


def _read(place: tuple[Path, str]) -> torch.Tensor:
    with safe_open(place[0], framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(place[1])
    return tensor


def _put(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Give a parameter values; one without memory becomes one with them."""
    old = module.get_parameter(name)
    if old.is_meta:
        setattr(module, name, nn.Parameter(tensor, requires_grad=old.requires_grad))
    else:
        old.copy_(tensor)
