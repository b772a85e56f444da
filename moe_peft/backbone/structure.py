"""Structural rules that find routers, blocks and expert modules in any transformers model, by place and shape.

    R1  experts: a module that is called with (hidden, index, weights) and owns one slice of weights per expert
    R2  block: the module that owns the experts; none where that is a decoder layer, which owns attention as well
    R3  router: called `gate` or `router`, beside the experts
    R4  routing: the inputs of the experts module (see `experts_call`)
    R5  widths and number of experts: those of the experts' weights
    R6  linear adapters stay out of routers
    R7  experts of an encoder of images or sound are not those of the language model
    R8  attention is no part of a block (see `attention`)

No rule asks for the name of a class, as quantization replaces classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.utils import parametrize

from ..place import MoeLayer
from .attention import attention_names
from .encoders import encoder_names
from .experts_call import takes_routing
from .partitioned import shape_of

# Names of the modules that decide about experts: anywhere, and where `experts` stands beside them.
ROUTER_NAMES = ("router", "router_gate")
ROUTER_NAMES_BESIDE_EXPERTS = ("gate", "shared_expert_gate", *ROUTER_NAMES)
# The first matrix of fused experts, and what modules without fused matrices call the width of their input.
FIRST_MATRICES = ("gate_up_proj", "up_proj")
WIDTHS = ("hidden_size", "hidden_dim", "d_model")


def base_of(module: nn.Module) -> nn.Module:
    """The backbone's own module, seen through peft's layers."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def router_names(model: nn.Module) -> set[str]:
    """Names of the modules that decide about a backbone's experts.

    A module called `router` is one wherever it stands; `gate` and `shared_expert_gate` are when `experts` stands
    beside them (the gate of a gated MLP is called `gate_proj`).

    Args:
        model: Any model.

    Returns:
        Full module names; what lies below them belongs to the router too.
    """
    names: set[str] = set()
    for prefix, module in model.named_modules():
        children = dict(module.named_children())
        candidates = ROUTER_NAMES_BESIDE_EXPERTS if "experts" in children else ROUTER_NAMES
        names.update(f"{prefix}.{child}".lstrip(".") for child in children if child in candidates)
    return names


def is_below(name: str, ancestors: set[str]) -> bool:
    """Whether a module name is one of the ancestors or lies below one of them."""
    parts = name.split(".")
    return any(".".join(parts[:end]) in ancestors for end in range(1, len(parts) + 1))


def layer_of(name: str, modules: Mapping[str, nn.Module]) -> tuple[int, int] | None:
    """The layer that a module belongs to, which is the first number in its name, and how many its stack has.

    Args:
        name: Full module name.
        modules: All modules of the model by their names.

    Returns:
        Index and number of layers; None outside of numbered layers.
    """
    parts = name.split(".")
    at = next((position for position, part in enumerate(parts) if part.isdecimal()), None)
    if at is None:
        return None
    stack = modules.get(".".join(parts[:at]))
    siblings = [] if stack is None else [child for child, _ in stack.named_children() if child.isdecimal()]
    return int(parts[at]), max(len(siblings), int(parts[at]) + 1)


def find_moe_layers(model: nn.Module) -> list[MoeLayer]:
    """The sparse layers of a language model whose experts an adapter can follow, in order; empty for a dense one.

    Args:
        model: Any model, with or without adapters.
    """
    found: list[MoeLayer] = []
    others, attention = _adapter_parts(model) | encoder_names(model), attention_names(model)
    for name, module in model.named_modules():
        parent_name, _, leaf = name.rpartition(".")
        if leaf == "base_layer" or leaf.startswith("shared") or is_below(name, others):
            continue
        if not _is_experts(leaf, base_of(module)):
            continue
        children = dict(model.get_submodule(parent_name).named_children())
        router = next((child for child in ("gate", "router") if child in children), None)
        shared = (child for child in children if child.startswith("shared") and not child.endswith("gate"))
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        num_experts, in_features, out_features = _sizes(base_of(module))
        found.append(
            MoeLayer(
                index=numbers[0] if numbers else len(found),
                experts=name,
                block=None
                if any(f"{parent_name}.{child}" in attention for child in children)
                else _outermost(parent_name),
                router=f"{parent_name}.{router}" if router else None,
                shared_experts=tuple(f"{parent_name}.{child}" for child in shared),
                num_experts=num_experts,
                in_features=in_features,
                out_features=out_features,
            )
        )
    return found


def opaque_blocks(model: nn.Module) -> dict[str, str]:
    """Sparse blocks whose experts no adapter can follow, as they are called without (index, weights) of each token.

    An adapter with a router of its own can still wrap such a block.

    Args:
        model: Any model, with or without adapters.

    Returns:
        Full name of the block -> why, in the model's order.
    """
    followed = {layer.experts.rpartition(".")[0] for layer in find_moe_layers(model)}
    routers, others = router_names(model), encoder_names(model) | attention_names(model)
    blocks: dict[str, str] = {}
    for parent_name, parent in model.named_modules():
        routes = any(f"{parent_name}.{child}" in routers for child, _ in parent.named_children())
        if not parent_name or not routes or parent_name in followed or is_below(parent_name, others):
            continue
        name, experts = _outermost(parent_name), dict(parent.named_children()).get("experts")
        if experts is None:
            reason = f"{name} ({type(parent).__name__}) calls no module with its routing"
        elif isinstance(experts, (nn.ModuleDict, nn.ModuleList)):
            reason = f"{name}.experts keeps a module for each expert and gives it only its own tokens"
        else:
            reason = f"{name}.experts ({type(experts).__name__}) runs every expert and is given no indices"
        blocks[name] = reason
    return blocks


def unsupported_reason(model: nn.Module) -> str | None:
    """Why no adapter can follow the experts of a model; None where one can, or where the model is dense."""
    if find_moe_layers(model):
        return None
    return next(iter(opaque_blocks(model).values()), None)


def block_width(block: nn.Module) -> int | None:
    """Width of the hidden states that a sparse block reads; None where nothing tells.

    It is the width of the router, as the experts may work in a narrower latent space.

    Args:
        block: The backbone's module.
    """
    children = dict(block.named_children())
    router = next((children[name] for name in ("gate", *ROUTER_NAMES) if name in children), None)
    if router is not None:
        for module in router.modules():
            width = getattr(module, "in_features", None)
            if isinstance(width, int):
                return width
        matrices = [shape for shape in map(shape_of, router.parameters()) if len(shape) == 2]
        if matrices:
            return matrices[0][1]
    return _named_width(block)


def _named_width(module: nn.Module) -> int | None:
    return next((getattr(module, width) for width in WIDTHS if isinstance(getattr(module, width, None), int)), None)


def _adapter_parts(model: nn.Module) -> set[str]:
    """Names of what peft's layers add to the modules that they wrap."""
    parts = ((name, part) for name, module in model.named_modules() for part, _ in module.named_children())
    layers = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    return {f"{name}.{part}" for name, part in parts if name in layers and part != "base_layer"}


def _is_experts(leaf: str, module: nn.Module) -> bool:
    """R1; a module called `experts` may keep its weights in another form, and then says how many and how wide."""
    if isinstance(module, (nn.ModuleDict, nn.ModuleList)):
        return False
    fused = all(any(len(shape) == 3 for shape in _shapes(module, names)) for names in (FIRST_MATRICES, ("down_proj",)))
    counted = leaf == "experts" and isinstance(getattr(module, "num_experts", None), int)
    return (fused or (counted and _named_width(module) is not None)) and takes_routing(type(module))


def _sizes(experts: nn.Module) -> tuple[int, int, int]:
    """R5: E, D and O. Where experts without weights are counted too, as identities, the last matrix has the others."""
    first, last = next(_shapes(experts, FIRST_MATRICES), ()), next(_shapes(experts, ("down_proj",)), ())
    if len(first) == len(last) == 3:
        if getattr(experts, "is_transposed", False):
            return last[0], first[1], last[2]
        return last[0], first[2], last[1]
    num_experts, width = cast(Any, experts).num_experts, _named_width(experts)
    assert width is not None
    return num_experts, width, width


def _shapes(module: nn.Module, names: tuple[str, ...]) -> Iterator[tuple[int, ...]]:
    """Shapes of the weights of these names; packed ones as they unpack, without unpacking them."""
    for name in names:
        parameter = module._parameters.get(name)
        if parameter is not None and parameter.is_floating_point():
            yield shape_of(parameter)
        elif parametrize.is_parametrized(module, name):
            state = getattr(module.parametrizations[name][0], "quant_state", None)  # type: ignore[index]
            yield tuple(getattr(module, name).shape if state is None else state.shape)


def _outermost(name: str) -> str:
    """Name of the layer that peft put in the place of a module."""
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return name
