"""Tiny random models with mixture-of-experts blocks, plain, renormalising, with shared experts; and PERFT on them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from peft import get_peft_model
from torch import nn

from moe_peft import PerftConfig
from moe_peft.layers import RoutedLayer
from tests.backbones.models import tiny_model
from tests.contract.cases import randomize, tiny_olmoe
from tests.tiny import tiny_mixtral

BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "olmoe": tiny_olmoe,
    "mixtral": tiny_mixtral,
    # Its router rescales the weights of the selected experts to sum to one.
    "qwen3_moe": partial(tiny_model, "qwen3_moe", num_experts=4, norm_topk_prob=True),
    # Its first layer is dense, its block adds a shared expert and scales the routed sum by 2.5.
    "deepseek_v2": partial(
        tiny_model, "deepseek_v2", n_routed_experts=4, first_k_dense_replace=1, routed_scaling_factor=2.5
    ),
    # It looks its routers up by their path.
    "minimax": partial(tiny_model, "minimax", num_local_experts=4),
}
# The four whose forward runs in float64.
SPARSE = ("olmoe", "mixtral", "qwen3_moe", "deepseek_v2")
# Those whose combine weights sum to one.
RENORMALISING = ("mixtral", "qwen3_moe")


def sparse_model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A frozen tiny model in eval mode, whose experts run in a Python loop, the only way that has float64."""
    model = BUILDERS[name]()
    model.set_experts_implementation("eager")
    return model.to(dtype).eval().requires_grad_(False)


def perft_config(variant: str, **fields) -> PerftConfig:
    return PerftConfig(**{"variant": variant, "r": 3, "lora_dropout": 0.0, "task_type": "CAUSAL_LM", **fields})


def perft_model(name: str, variant: str, **fields) -> nn.Module:
    """A float64 model in eval mode with random adapters."""
    model = get_peft_model(sparse_model(name, torch.float64), perft_config(variant, **fields)).eval()
    randomize(model)
    return model.double()


def block_of(model: nn.Module) -> nn.Module:
    """The second layer's block, which is sparse in all models."""
    return model.base_model.model.model.layers[1].mlp


def layer_of(model: nn.Module) -> RoutedLayer:
    (layer,) = [module for module in block_of(model).modules() if isinstance(module, RoutedLayer)]
    return layer


def experts_of(model: nn.Module):
    return layer_of(model).experts["default"]


def router_weight(model: nn.Module) -> nn.Parameter:
    return layer_of(model).router["default"].weight
