"""The methods and the models of the contract suite: every method must keep every promise on every model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    set_seed,
)

from moe_peft import (
    EsftConfig,
    ExpertLoraConfig,
    LoraMoeConfig,
    MoloraConfig,
    MovConfig,
    PerftConfig,
    RoutedConfig,
    SiraConfig,
)
from moe_peft.layers import RoutedLayer
from tests.tiny import DECODER, LAYERS, VOCAB, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

SMALL = {"r": 2, "num_experts": 4}
METHODS: dict[str, Callable] = {
    "loramoe": lambda **kw: LoraMoeConfig(**{**SMALL, "lora_dropout": 0.0, **kw}),
    "loramoe-groups": lambda **kw: LoraMoeConfig(
        **{**SMALL, "lora_dropout": 0.0, "expert_groups": [0, 0, 1, 1], **kw}
    ),
    "molora": lambda **kw: MoloraConfig(**{**SMALL, **kw}),
    "molora-top2": lambda **kw: MoloraConfig(**{**SMALL, "top_k": 2, **kw}),
    "sira": lambda **kw: SiraConfig(**{**SMALL, "top_k": 2, "expert_dropout": 0.0, **kw}),
    "routed": lambda **kw: RoutedConfig(**{**SMALL, "router_z_loss_coef": 0.01, **kw}),
    "mov": lambda **kw: MovConfig(**{"num_experts": 4, **kw}),
    "mov-top2": lambda **kw: MovConfig(**{"num_experts": 4, "top_k": 2, "router_granularity": "token", **kw}),
    "routed-bottleneck": lambda **kw: RoutedConfig(**{**SMALL, "experts": "bottleneck", **kw}),
    "perft-r": lambda **kw: PerftConfig(**{**SMALL, "lora_dropout": 0.0, **kw}),
    "perft-r-bottleneck": lambda **kw: PerftConfig(**{**SMALL, "experts": "bottleneck", "lora_dropout": 0.0, **kw}),
    "perft-d": lambda **kw: PerftConfig(**{**SMALL, "variant": "D", "lora_dropout": 0.0, **kw}),
    "perft-s": lambda **kw: PerftConfig(**{"r": 2, "variant": "S", "lora_dropout": 0.0, **kw}),
    "perft-e": lambda **kw: PerftConfig(**{"r": 2, "variant": "E", "lora_dropout": 0.0, **kw}),
    "esft": lambda **kw: EsftConfig(**{"experts": {"1": [1, 3]}, **kw}),
    "esft-lora": lambda **kw: EsftConfig(**{"experts": {"1": [1, 3]}, "expert_adapter": "lora", "r": 2, **kw}),
    "expert-lora": lambda **kw: ExpertLoraConfig(**{"r": 2, **kw}),
    "expert-lora-selected": lambda **kw: ExpertLoraConfig(**{"experts": {"1": [1, 3]}, "r": 2, **kw}),
    "routed-eager": lambda **kw: RoutedConfig(**{**SMALL, "experts_implementation": "eager", **kw}),
}

# Methods that wrap blocks, and those that follow a backbone's own routing.
OF_BLOCKS = ("perft-r", "perft-r-bottleneck", "perft-d", "perft-s")
OF_EXPERTS = ("perft-e", "esft", "esft-lora", "expert-lora", "expert-lora-selected")


@dataclass(frozen=True)
class ModelCase:
    """A model, the batch it is run on, and what may be asked of it."""

    build: Callable[[], nn.Module]
    task_type: str
    targets: dict[str, list[str]] = field(default_factory=dict)
    causal: bool = True
    has_blocks: bool = True
    has_experts: bool = False
    seq_to_seq: bool = False
    decoding_error: float = 1e-9

    def batch(self, seed: int = 0) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        input_ids = torch.randint(3, VOCAB, (3, 9), generator=generator)
        mask = torch.ones_like(input_ids)
        mask[1, 6:] = 0
        batch = {"input_ids": input_ids, "attention_mask": mask}
        if self.seq_to_seq:
            batch["labels"] = torch.randint(3, VOCAB, (3, 5), generator=generator)
        elif self.causal:
            batch["labels"] = input_ids.masked_fill(mask == 0, -100)
        else:
            batch["labels"] = torch.tensor([0, 1, 2])
        return batch

    def config(self, method: str, **overrides):
        targets = {} if method in (*OF_BLOCKS, *OF_EXPERTS) else self.targets
        return METHODS[method](task_type=self.task_type, **{**targets, **overrides})

    def supports(self, method: str) -> bool:
        """Whether the model has what the method wraps."""
        return (method not in OF_EXPERTS or self.has_experts) and (method not in OF_BLOCKS or self.has_blocks)


def tiny_qwen3(seed: int = 0) -> Qwen3ForCausalLM:
    set_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**DECODER, head_dim=8))


def tiny_olmoe(seed: int = 0) -> OlmoeForCausalLM:
    set_seed(seed)
    sizes = {"intermediate_size": 16, "num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2}
    model = OlmoeForCausalLM(OlmoeConfig(**{**DECODER, **sizes}))
    model.set_experts_implementation("eager")  # grouped_mm has no float64
    return model


def tiny_deepseek_v2(seed: int = 0) -> DeepseekV2ForCausalLM:
    """Latent attention, a dense layer before the sparse ones, and shared experts."""
    set_seed(seed)
    heads = {"num_key_value_heads": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "head_dim": 8}
    ranks = {"kv_lora_rank": 16, "q_lora_rank": None}
    experts = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    layers = {"num_hidden_layers": LAYERS + 1, "first_k_dense_replace": 1}
    model = DeepseekV2ForCausalLM(DeepseekV2Config(**{**DECODER, **heads, **ranks, **experts, **layers}))
    model.set_experts_implementation("eager")
    return model


MODELS: dict[str, ModelCase] = {
    "llama": ModelCase(tiny_llama, "CAUSAL_LM"),
    "qwen3": ModelCase(tiny_qwen3, "CAUSAL_LM"),
    "gpt2": ModelCase(tiny_gpt2, "CAUSAL_LM"),
    "t5": ModelCase(tiny_t5, "SEQ_2_SEQ_LM", causal=False, seq_to_seq=True),
    "bert": ModelCase(tiny_bert, "SEQ_CLS", causal=False, has_blocks=False),
    "olmoe": ModelCase(tiny_olmoe, "CAUSAL_LM", {"target_modules": ["q_proj", "v_proj"]}, has_experts=True),
    "deepseek_v2": ModelCase(
        # Keys are rotated in float32 whatever the model's precision.
        tiny_deepseek_v2,
        "CAUSAL_LM",
        has_experts=True,
        decoding_error=1e-5,
    ),
}


def groups_for(config, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The column with one group per row, for a configuration that needs it."""
    if getattr(config, "expert_groups", None) is None:
        return {}
    return {config.group_column: torch.arange(len(batch["input_ids"])) % 2}


def adapter_parameters(model: nn.Module, kind: str = "") -> dict[str, nn.Parameter]:
    """The adapters' parameters by name, of "experts" or "router" alone where said; shared_experts are the base's."""
    prefixes = tuple({module.prefix for module in model.modules() if isinstance(module, RoutedLayer)})
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if any(f".{prefix}{kind}" in name for prefix in prefixes)
    }


def randomize(model: nn.Module, seed: int = 1) -> None:
    """Give the adapters non-zero weights, so that they change the output."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(model).values():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
