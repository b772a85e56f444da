"""Llama-like models of random weights, and the adapters of dense backbones that are compared on them."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from peft import IA3Config, LoraConfig, PeftConfig, XLoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import moe_peft

FFN = ["gate_proj", "up_proj", "down_proj"]
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", *FFN]
VECTORS = ["k_proj", "v_proj", "down_proj"]
LORA, IA3, XLORA, FROZEN = "peft LoRA", "peft (IA)3", "peft X-LoRA", "frozen model"
TOP_2 = "top-2, balance and z-loss"
VOCABULARY = 2048


def backbone(hidden: int, layers: int, dtype: torch.dtype, length: int = 4096) -> nn.Module:
    """A frozen model on the GPU, where there is one.

    Args:
        hidden: Width; that of the FFN is four times as much.
        layers: Number of layers.
        dtype: Of its weights.
        length: Positions that it knows.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        max_position_embeddings=length,
        pad_token_id=0,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return LlamaForCausalLM(config).to(device, dtype).requires_grad_(False)


def configs(num_experts: int, r: int, targets: list[str]) -> dict[str, PeftConfig | None]:
    """Contestants by name: stock peft's adapters, and ours of the same number of parameters.

    Args:
        num_experts: E.
        r: Rank of an expert; LoRA has E times as much.
        targets: Names of the adapted linear layers, but for vectors.
    """
    rank = num_experts * r
    shared = {"r": r, "lora_alpha": 8 * r, "num_experts": num_experts, "target_modules": targets}
    lora = {"r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    causal = {"task_type": "CAUSAL_LM"}
    vectors = {"target_modules": VECTORS, "feedforward_modules": ["down_proj"], **causal}
    return {
        LORA: LoraConfig(**lora, **causal),
        FROZEN: None,
        "LoRAMoE": moe_peft.LoraMoeConfig(lora_dropout=0.0, **shared, **causal),
        TOP_2: moe_peft.RoutedConfig(router="top_k", top_k=2, router_z_loss_coef=0.001, **shared, **causal),
        "SiRA": moe_peft.SiraConfig(**shared, **causal),
        "MoLORA": moe_peft.MoloraConfig(**shared, **causal),
        f"{LORA}, dropout 0.05": LoraConfig(lora_dropout=0.05, **lora, **causal),
        "LoRAMoE, dropout 0.05": moe_peft.LoraMoeConfig(lora_dropout=0.05, **shared, **causal),
        IA3: IA3Config(**vectors),
        "MoV": moe_peft.MovConfig(num_experts=num_experts, **vectors),
    }


def baseline_of(name: str) -> str:
    """Which of stock peft's adapters a contestant is divided by.

    Args:
        name: Of `configs`, or X-LoRA or the loop.
    """
    if name in (IA3, "MoV"):
        return IA3
    return f"{LORA}, dropout 0.05" if "dropout" in name else LORA


def adapted(base: nn.Module, config: PeftConfig | None) -> nn.Module:
    """An adapter on a copy that shares the base's parameters; the frozen copy itself without a configuration.

    Args:
        base: A frozen model.
        config: The adapter.
    """
    twin = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
    if config is None:
        return twin
    # Adapters in the dtype of the model: what is compared is the same arithmetic.
    return get_peft_model(twin, config, autocast_adapter_dtype=False)


def x_lora(base: nn.Module, num_experts: int, r: int, targets: list[str]) -> nn.Module:
    """Stock peft's X-LoRA over LoRA adapters that train.

    Args:
        base: A frozen model.
        num_experts: Number of LoRA adapters.
        r: Their rank.
        targets: Names of the adapted linear layers.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = {str(expert): str(Path(folder) / str(expert)) for expert in range(num_experts)}
        one = adapted(base, LoraConfig(r=r, target_modules=targets, task_type="CAUSAL_LM"))
        for path in paths.values():
            one.save_pretrained(path)
        twin = adapted(base, None)
        twin.config.use_cache = False
        config = XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=base.config.hidden_size,
            xlora_depth=1,
            adapters=paths,
            use_trainable_adapters=True,
        )
        return get_peft_model(twin, config)
