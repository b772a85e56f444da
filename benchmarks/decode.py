"""One token after another with a KV cache: adapters of dense and of mixture-of-experts backbones, against plain LoRA.

    python benchmarks/decode.py [--backbones dense moe] [--dtypes float32 bfloat16] [--output results.json]

Every contestant reads the same prompt, then a few single tokens: on a Llama-like model with adapters on the FFN, and
on an OLMoE-like model with adapters around its blocks and experts, both of random weights. The logits with the cache
are compared to those without before anything is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from dense_models import FFN, FROZEN, LORA, adapted, backbone, baseline_of, configs
from peft import LoraConfig, PeftConfig
from timing import interleave, print_rows, rows, write
from torch import nn
from transformers import OlmoeConfig, OlmoeForCausalLM

import moe_peft

ON_ATTENTION = "peft LoRA r=16 on attention"
VOCABULARY = 512
# Decoding has no dropout: contestants that differ in it alone are left out.
DENSE = ("LoRAMoE", "top-2, balance and z-loss", "SiRA", "MoLORA", "peft (IA)3", "MoV")


def moe_configs(num_experts: int, num_layers: int) -> dict[str, PeftConfig | None]:
    """The contestants on a mixture of experts; None is the model itself."""
    selected = {str(layer): list(range(max(1, num_experts // 10))) for layer in range(num_layers)}
    return {
        ON_ATTENTION: LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
        FROZEN: None,
        "PERFT-S r=16": moe_peft.PerftConfig(variant="S"),
        "PERFT-R top 2 of 8, r=16": moe_peft.PerftConfig(num_experts=8),
        "PERFT-E r=4": moe_peft.PerftConfig(variant="E", r=4),
        "ESFT, 10% of the experts": moe_peft.EsftConfig(experts=selected),
        "ESFT, low-rank r=8 on 10% of the experts": moe_peft.EsftConfig(experts=selected, expert_adapter="lora", r=8),
        "MoV-10 on keys and values": moe_peft.MovConfig(),
    }


def moe_backbone(args: argparse.Namespace, dtype: torch.dtype) -> nn.Module:
    """A frozen OLMoE-like model."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.hidden,
        intermediate_size=args.hidden // 2,
        num_hidden_layers=args.layers,
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        num_attention_heads=8,
        num_key_value_heads=8,
        pad_token_id=0,
    )
    model = OlmoeForCausalLM(config).to("cuda" if torch.cuda.is_available() else "cpu", dtype)
    model.set_experts_implementation(args.implementation)
    return model.requires_grad_(False)


@torch.no_grad()
def check_cache(model: nn.Module, ids_BL: torch.Tensor) -> None:
    """The last token's logits with a cache are those without."""
    whole = model(input_ids=ids_BL, use_cache=False).logits[:, -1]
    cache = model(input_ids=ids_BL[:, :-1], use_cache=True).past_key_values
    last = model(input_ids=ids_BL[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
    tolerance = 1e-4 if whole.dtype == torch.float32 and ids_BL.device.type == "cpu" else 5e-2
    torch.testing.assert_close(last, whole, rtol=tolerance, atol=tolerance)


def decode(model: nn.Module, ids_BL: torch.Tensor, num_tokens: int) -> Callable[[], None]:
    """Read single tokens after a prompt that was read before the clock starts; the cache is cut back each time."""
    with torch.no_grad():
        cache = model(input_ids=ids_BL, use_cache=True).past_key_values

    @torch.no_grad()
    def run() -> None:
        for _ in range(num_tokens):
            model(input_ids=ids_BL[:, -1:], past_key_values=cache, use_cache=True)
        cache.crop(-num_tokens)

    return run


def contestants(args: argparse.Namespace, kind: str, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """Decoding by each contestant on one kind of backbone."""
    if kind == "dense":
        base, own = backbone(args.hidden, args.layers, dtype), configs(8, 4, FFN)
        own = {name: config for name, config in own.items() if name in (LORA, FROZEN, *DENSE)}
    else:
        base, own = moe_backbone(args, dtype), moe_configs(args.experts, args.layers)
    ids_BL = torch.randint(3, VOCABULARY, (1, args.prompt), device=base.device)
    works = {}
    for name, config in own.items():
        model = adapted(base, config).eval()
        check_cache(model, ids_BL)
        works[name] = decode(model, ids_BL, args.tokens)
    return works


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--backbones", nargs="+", default=["dense", "moe"], choices=["dense", "moe"])
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=32, help="tokens in the cache")
    parser.add_argument("--tokens", type=int, default=4, help="tokens that are timed in each round")
    parser.add_argument("--implementation", default="eager", help="how the backbone computes its experts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    title = f"{args.tokens} tokens one by one after {args.prompt}, {args.layers} layers of width {args.hidden}"
    found = []
    for dtype in args.dtypes:
        for kind in args.backbones:
            times = interleave(contestants(args, kind, getattr(torch, dtype)), rounds=args.rounds)
            over = {name: ON_ATTENTION if kind == "moe" else baseline_of(name) for name in times}
            own = rows(times, over, backbone=kind, dtype=dtype)
            print_rows(f"{title}, {kind}, {dtype}", own)
            found += own
    write(args.output, title, found)


if __name__ == "__main__":
    main()
