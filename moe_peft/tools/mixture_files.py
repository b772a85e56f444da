"""Mixtures of LoRAs in the files of TUDB-Labs' trainers, MixLoRA and MoE-PEFT, where an equal exists.

    mola       each linear layer: softmax, the top k of its experts, weights rescaled to sum to one
    loramoe    each linear layer of the FFN: softmax over all experts; LoRA on attention
    mixlora    experts are FFNs with LoRA on their matrices, one router for the FFN, as mola; LoRA on attention

Tensors are `{kind}.layers.{l}.{self_attn|mlp}.{name}.experts.{e}.lora_{A|B}.weight` and `....moe_gate.weight`; newer
files of MixLoRA write `mixlora.layers.{l}.experts.{e}.{name}` and `mixlora.layers.{l}.gate`. A LoRA beside the routers
is experts that are all equal, or an adapter of its own where the experts are FFNs.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from ..config.adapter_files import CONFIG, PICKLED_WEIGHTS, WEIGHTS, is_finite, read_json_object
from ..config.ranges import LARGEST
from ..experts import EXPERTS
from ..messages import shown
from ..methods import RoutedConfig
from .checks import check_module, is_real
from .other_experts import routed_by_name

GATE = re.compile(
    r"\w+\.layers\.(?P<layer>\d+)(?:\.(?P<part>self_attn|mlp))?(?:\.(?P<name>\w+))?\.(?:moe_)?gate\.weight"
)
EXPERT = re.compile(
    r"\w+\.layers\.(?P<layer>\d+)\.(?P<part>self_attn|mlp)\.(?P<name>\w+)\.experts\.(?P<expert>\d+)"
    r"\.lora_(?P<factor>[AB])\.weight"
)
NEWER_EXPERT = re.compile(
    r"mixlora\.layers\.(?P<layer>\d+)\.experts\.(?P<expert>\d+)\.(?P<name>\w+)\.lora_(?P<factor>[AB])\.weight"
)
PLAIN = re.compile(
    r"\w+\.layers\.(?P<layer>\d+)\.(?P<part>self_attn|mlp)\.(?P<name>\w+)\.lora_(?P<factor>[AB])\.weight"
)
KINDS = ("mola", "loramoe", "mixlora")
FFN = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


@dataclass
class Mixture:
    """What a file holds.

    Attributes:
        gates: Layer's part, or one of its linear layers -> (E, D) router.
        experts: Linear layer -> expert -> factor -> matrix.
        plain: Linear layer -> factor -> matrix of a LoRA without a router.
    """

    gates: dict[str, torch.Tensor] = field(default_factory=dict)
    experts: dict[str, dict[int, dict[str, torch.Tensor]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(dict))
    )
    plain: dict[str, dict[str, torch.Tensor]] = field(default_factory=lambda: defaultdict(dict))


def import_mixture(base: nn.Module, folder: str | Path, adapter_name: str = "default") -> PeftModel:
    """Put a mixture of LoRAs in the files of MixLoRA or MoE-PEFT on a model.

    Args:
        base: The base model, without adapters.
        folder: Local folder with adapter_config.json and adapter_model.safetensors or adapter_model.bin.
        adapter_name: Name of the new adapter; LoRA beside experts that are FFNs becomes a second one, active as well,
            called `<adapter_name>_attention`.

    Returns:
        The adapted model.

    Raises:
        TypeError: The base is no model.
        ValueError: It is of another kind, which is named with what to do, lacks a tensor or has one that is not
            finite, or does not fit the model. The model is as it was.
    """
    check_module(base, "import_mixture", "base")
    folder = Path(folder)
    settings = read_json_object(folder / CONFIG)
    kind = str(settings.get("routing_strategy") or settings.get("peft_type") or "").lower()
    _check_kind(folder, kind, settings)
    found = _read(folder, _tensors(folder))
    names = _names(base, [*found.experts, *found.plain])
    _check_tensors(base, folder, found, names, settings)
    shared = {
        "num_experts": settings["num_experts"],
        "r": settings["r"],
        "lora_alpha": settings["lora_alpha"],
        "use_rslora": bool(settings.get("use_rslora", False)),
        "task_type": settings.get("task_type"),
    }
    if kind == "mixlora":
        return _ffns(base, found, names, shared, settings, adapter_name)
    routing: dict[str, Any] = {"router": "dense"}
    if kind == "mola":
        routing = {"router": "top_k", "top_k": settings.get("top_k", 2), "norm_topk_prob": True}
    config = RoutedConfig(target_modules=sorted(names.values()), **shared, **routing)
    model = get_peft_model(base, config, adapter_name=adapter_name)
    assert isinstance(model, PeftModel)
    _fill_linears(model, adapter_name, found, names)
    return model


def _check_kind(folder: Path, kind: str, settings: Mapping[str, Any]) -> None:
    if kind == "xlora":
        adapters = settings.get("adapters") or {}
        raise ValueError(
            f"{folder} is an X-LoRA, which weighs its LoRAs by a second forward pass of the whole model; no router of "
            f"a layer equals it. Its LoRAs can be composed under a router of ours: moe_peft.tools.compose(base, "
            f"{shown(adapters)})."
        )
    if kind not in KINDS:
        raise ValueError(f"{folder} holds {shown(kind)}, and mixtures of the kinds {', '.join(KINDS)} can be read.")
    for name in ("num_experts", "r", "lora_alpha"):
        value = settings.get(name)
        if not is_real(value, 0, LARGEST) or value == 0 or (name != "lora_alpha" and type(value) is not int):
            raise ValueError(f"{folder / CONFIG} has {name}={shown(value)}, where a positive number belongs.")
    for name in ("use_dora", "jitter_noise", "router_jitter_noise"):
        if settings.get(name):
            raise ValueError(
                f"{folder} has {name}={shown(settings[name])}, which changes what is computed in a way that no "
                "adapter here does. There is no equal form."
            )


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    if (folder / WEIGHTS).is_file():
        return load_file(folder / WEIGHTS)
    if (folder / PICKLED_WEIGHTS).is_file():
        loaded: dict[str, torch.Tensor] = torch.load(folder / PICKLED_WEIGHTS, map_location="cpu", weights_only=True)
        return loaded
    raise ValueError(f"{folder} holds neither {WEIGHTS} nor {PICKLED_WEIGHTS}.")


def _read(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Mixture:
    found = Mixture()
    for key, tensor in tensors.items():
        gate, plain = GATE.fullmatch(key), PLAIN.fullmatch(key)
        expert, newer = EXPERT.fullmatch(key), NEWER_EXPERT.fullmatch(key)
        if gate is not None:
            place = f"layers.{gate['layer']}.{gate['part'] or 'mlp'}"
            found.gates[f"{place}.{gate['name']}" if gate["name"] else place] = tensor
        elif expert is not None:
            place = f"layers.{expert['layer']}.{expert['part']}.{expert['name']}"
            found.experts[place][int(expert["expert"])][expert["factor"]] = tensor
        elif newer is not None:
            place = f"layers.{newer['layer']}.mlp.{newer['name']}"
            found.experts[place][int(newer["expert"])][newer["factor"]] = tensor
        elif plain is not None:
            place = f"layers.{plain['layer']}.{plain['part']}.{plain['name']}"
            found.plain[place][plain["factor"]] = tensor
        else:
            raise ValueError(f"{folder} holds {shown(key)}, which is no router and no pair of an expert.")
    return found


def _check_tensors(
    base: nn.Module, folder: Path, found: Mixture, names: Mapping[str, str], settings: Mapping[str, Any]
) -> None:
    """Refuse a file that lacks a tensor, or holds one of another shape or with NaN or infinite values."""
    r, count = settings["r"], settings["num_experts"]
    for place, name in names.items():
        linear: Any = base.get_submodule(name)
        shapes = {"A": (r, linear.in_features), "B": (linear.out_features, r)}
        pairs = {0: found.plain[place]} if place in found.plain else found.experts[place]
        experts = range(1 if place in found.plain else count)
        for expert in experts:
            for factor, shape in shapes.items():
                own = pairs.get(expert, {}).get(factor)
                if own is None or tuple(own.shape) != shape or not is_finite(own):
                    what = "lacks it" if own is None else f"has shape {tuple(own.shape)}, or NaN or infinite values"
                    raise ValueError(
                        f"{folder} needs {factor} of shape {shape} of expert {expert} at {shown(place)}, and {what}: "
                        "it is not whole, or of another model. Nothing has been changed."
                    )
    wrong = [place for place, gate in found.gates.items() if gate.shape[:1] != (count,) or not is_finite(gate)]
    lost = [place for place in found.experts if not {place, place.rpartition(".")[0]} & found.gates.keys()]
    if wrong or lost:
        raise ValueError(
            f"{folder} needs a router of {count} finite rows at {shown((wrong + lost)[0])}. Nothing has been changed."
        )


def _names(base: nn.Module, places: list[str]) -> dict[str, str]:
    """Full names of the model's linear layers by those in the file."""
    own = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    names = {}
    for place in places:
        fitting = [name for name in own if name == place or name.endswith(f".{place}")]
        if len(fitting) != 1:
            raise ValueError(
                f"The model has {len(fitting)} linear layers {shown(place)}: the file is of another model."
            )
        names[place] = fitting[0]
    return names


@torch.no_grad()
def _fill_linears(model: PeftModel, adapter_name: str, found: Mixture, names: Mapping[str, str]) -> None:
    layers = routed_by_name(model, adapter_name)
    for place, name in names.items():
        bank, router = layers[name].experts[adapter_name], layers[name].router[adapter_name]
        weight = router.get_parameter("weight")
        if place in found.plain:  # equal experts, whose weights sum to one whatever the router says
            weight.zero_()
        else:
            weight.copy_(found.gates[place])
        for expert in range(bank.num_choices):
            own = found.plain[place] if place in found.plain else found.experts[place][expert]
            bank.A[expert].copy_(own["A"])
            bank.B[expert].copy_(own["B"].T)


@torch.no_grad()
def _ffns(
    base: nn.Module,
    found: Mixture,
    names: dict[str, str],
    shared: dict[str, Any],
    settings: Mapping[str, Any],
    own: str,
) -> PeftModel:
    """Experts that are FFNs, and beside them the LoRA on attention as an adapter of one expert."""
    blocks = {names[place].rpartition(".")[0]: place.rpartition(".")[0] for place in found.experts}
    config = RoutedConfig(
        wraps="block",
        experts=next(name for name, own_kind in EXPERTS.items() if own_kind.placement == "ffn"),
        router="top_k",
        top_k=settings.get("top_k", 2),
        norm_topk_prob=True,
        target_modules=sorted(blocks),
        **shared,
    )
    model = get_peft_model(base, config, adapter_name=own)
    assert isinstance(model, PeftModel)
    layers = routed_by_name(model, own)
    for name, place in blocks.items():
        bank, router = layers[name].experts[own], layers[name].router[own]
        router.get_parameter("weight").copy_(found.gates[place])
        for projection, matrix in FFN.items():
            A, B = bank.get_parameter(f"{matrix}_A"), bank.get_parameter(f"{matrix}_B")
            pairs = found.experts.get(f"{place}.{projection}")
            for expert in range(bank.num_choices):
                if pairs is None:
                    B[expert].zero_()
                    continue
                A[expert].copy_(pairs[expert]["A"])
                B[expert].copy_(pairs[expert]["B"].T)
    if found.plain:
        attention = f"{own}_attention"
        beside = RoutedConfig(
            router="dense",
            target_modules=sorted(names[place] for place in found.plain),
            **{**shared, "num_experts": 1},
        )
        model.add_adapter(attention, beside)
        _fill_linears(model, attention, Mixture(plain=found.plain), {p: names[p] for p in found.plain})
        tuner: Any = model.base_model
        tuner.set_adapter([own, attention])
    return model
