"""Tiny float64 mixture-of-experts models with decided routers, and both scores of their experts in plain loops."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from moe_peft.backbone.structure import find_moe_layers
from tests.backbones.models import tiny_model


def decided(model_type: str, **overrides) -> nn.Module:
    """A model whose routers prefer some experts clearly, so that rounding does not change a choice."""
    model = tiny_model(model_type, **overrides)
    model.set_experts_implementation("eager")  # grouped_mm has no float64
    model = model.double().train()
    for layer in find_moe_layers(model):
        weight = model.get_submodule(layer.router).weight
        weight.data = torch.randn(weight.shape, dtype=torch.float64)
    return model


def olmoe(num_experts: int = 6, **overrides) -> nn.Module:
    return decided("olmoe", **{"num_experts": num_experts, "intermediate_size": 16, **overrides})


# Model -> whether the used weights of a token are rescaled to sum to one, and the factor of all weights.
MODELS = {
    "olmoe": (olmoe, False, 1.0),
    "mixtral": (partial(decided, "mixtral", num_local_experts=5), True, 1.0),
    "qwen3_moe": (partial(decided, "qwen3_moe", norm_topk_prob=True), True, 1.0),
    "deepseek_v2": (
        partial(decided, "deepseek_v2", num_hidden_layers=3, first_k_dense_replace=1, routed_scaling_factor=1.7),
        False,
        1.7,
    ),
}


def block_inputs(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Decoder layer -> (B, L, D) input of its sparse block."""
    seen, handles = {}, []
    for layer in find_moe_layers(model):
        hook = lambda module, args, index=layer.index: seen.__setitem__(index, args[0].detach())  # noqa: E731
        handles.append(model.get_submodule(layer.block).register_forward_pre_hook(hook))
    with torch.no_grad():
        model.eval()(**batch)
    for handle in handles:
        handle.remove()
    return seen


def reference_scores(name: str, model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> dict[tuple, list[float]]:
    """(criterion, aggregate, layer) -> scores: softmax of router logits and top-k by hand, token by token."""
    _, renormalizes, factor = MODELS[name]
    k, scores = model.config.num_experts_per_tok, {}
    for layer in find_moe_layers(model):
        weight = model.get_submodule(layer.router).weight.detach()
        gate, token, mean_gate, mean_token = ([0.0] * layer.num_experts for _ in range(4))
        num_tokens = num_samples = 0
        for batch in batches:
            for row, mask in zip(block_inputs(model, batch)[layer.index], batch["attention_mask"], strict=True):
                length = int(mask.sum())
                num_samples += 1
                num_tokens += length
                for x, valid in zip(row, mask, strict=True):
                    if not valid:
                        continue
                    probs = (weight @ x).softmax(-1).tolist()
                    chosen = sorted(range(layer.num_experts), key=lambda e: -probs[e])[:k]
                    total = sum(probs[e] for e in chosen) if renormalizes else 1.0
                    for e in chosen:
                        gate[e] += factor * probs[e] / total
                        token[e] += 1 / k
                        mean_gate[e] += factor * probs[e] / total / length
                        mean_token[e] += 1 / k / length
        scores["gate", "token", layer.index] = [value / num_tokens for value in gate]
        scores["token", "token", layer.index] = [value / num_tokens for value in token]
        scores["gate", "sample", layer.index] = [value / num_samples for value in mean_gate]
        scores["token", "sample", layer.index] = [value / num_samples for value in mean_token]
    return scores
