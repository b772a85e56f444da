"""Writes the memory table of docs/scale.md, from models on the meta device and what `describe` says of adapters.

Run from anywhere: `python docs/write_scale.py`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import DeepseekV3Config, GptOssConfig, Qwen3MoeConfig

from moe_peft import EsftConfig, ExpertLoraConfig, PerftConfig, describe
from moe_peft.backbone.sizes import num_base_weights
from moe_peft.backbone.structure import find_moe_layers
from moe_peft.backbone.without_weights import meta_model
from moe_peft.quantization.four_bit import four_bit_bytes

PAGE = Path(__file__).parent / "scale.md"
# The sizes of each model's config.json on the Hub.
QWEN3 = {"vocab_size": 151936, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "num_key_value_heads": 4}
MODELS = {
    "Qwen3-30B-A3B": lambda: Qwen3MoeConfig(
        hidden_size=2048, moe_intermediate_size=768, num_hidden_layers=48, num_attention_heads=32, **QWEN3
    ),
    "gpt-oss-120b": lambda: GptOssConfig(num_hidden_layers=36, num_local_experts=128),
    "Qwen3-235B-A22B": lambda: Qwen3MoeConfig(
        hidden_size=4096, moe_intermediate_size=1536, num_hidden_layers=94, num_attention_heads=64, **QWEN3
    ),
    "DeepSeek-V3": lambda: DeepseekV3Config(),
}
# Share of the experts of a layer that a task selects.
SELECTED = 0.05
# Weights, gradients, and AdamW's two numbers, in float32.
TRAINING_BYTES = 16


def selection(model: Any) -> dict[str, list[int]]:
    """The first experts of every sparse layer, as many as a task selects."""
    return {
        str(layer.index): list(range(round(SELECTED * layer.num_experts)))
        for layer in find_moe_layers(model)
        if layer.num_experts
    }


def configs(model: Any) -> dict[str, Any]:
    """The adapters of the table."""
    experts = selection(model)
    return {
        "PERFT-R, 8 of r 16": PerftConfig(variant="R", num_experts=8, r=16),
        "PERFT-E, r 4": PerftConfig(variant="E", r=4),
        "ESFT, 5 %": EsftConfig(experts=experts),
        "ESFT, 5 %, low-rank, r 16": EsftConfig(experts=experts, expert_adapter="lora", r=16),
        "expert LoRA, r 16": ExpertLoraConfig(r=16),
    }


def row(name: str) -> list[str]:
    """One model: GB of its weights in 16 bits and with experts in 4, and for each adapter what it trains."""
    model = meta_model(MODELS[name]())
    weights = num_base_weights(model)
    experts = sum(
        parameter.numel()
        for layer in find_moe_layers(model)
        for parameter in model.get_submodule(layer.experts).parameters()
        if parameter.dim() == 3
    )
    packed = 2 * (weights - experts) + four_bit_bytes(experts, double_quant=True)
    trained = [describe(model, config).num_parameters for config in configs(model).values()]
    sizes = (f"{count / 1e6:,.0f} M, {TRAINING_BYTES * count / 1e9:,.1f} GB" for count in trained)
    return [name, f"{2 * weights / 1e9:,.0f}", f"{packed / 1e9:,.0f}", *sizes]


def table() -> str:
    """The table in Markdown."""
    head = ["model", "16 bit, GB", "experts in 4 bits, GB", *configs(meta_model(MODELS["Qwen3-30B-A3B"]()))]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *map(row, MODELS)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def written(text: str, new: str) -> str:
    """The page with another table in the place of its own."""
    return re.sub(r"\| model \|.*?\n\n", lambda _: f"{new}\n\n", text, count=1, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(), table()))
