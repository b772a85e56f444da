"""One token after another with a KV cache: adapters of a mixture-of-experts backbone, against plain LoRA on attention.

    python benchmarks/decode.py [--output results.json]

Every contestant reads the same prompt, then a few single tokens, on one OLMoE-like model of random weights. The logits
with the cache are compared to those without before anything is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from moe_block import adapted
from peft import LoraConfig, PeftConfig
from timing import interleave, report
from torch import nn
from transformers import OlmoeConfig, OlmoeForCausalLM

import moe_peft

BASELINE = "peft LoRA r=16 on attention"
VOCABULARY = 512


def configs(num_experts: int, num_layers: int) -> dict[str, PeftConfig | None]:
    """The contestants; None is the model itself."""
    selected = {str(layer): list(range(max(1, num_experts // 10))) for layer in range(num_layers)}
    return {
        BASELINE: LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
        "frozen model": None,
        "PERFT-S r=16": moe_peft.PerftConfig(variant="S"),
        "PERFT-R top 2 of 8, r=16": moe_peft.PerftConfig(num_experts=8),
        "PERFT-E r=4": moe_peft.PerftConfig(variant="E", r=4),
        "ESFT, 10% of the experts": moe_peft.EsftConfig(experts=selected),
        "ESFT, low-rank r=8 on 10% of the experts": moe_peft.EsftConfig(experts=selected, expert_adapter="lora", r=8),
        "MoV-10 on keys and values": moe_peft.MovConfig(),
    }


@torch.no_grad()
def check_cache(model: nn.Module, ids_BL: torch.Tensor) -> None:
    """The last token's logits with a cache are those without."""
    whole = model(input_ids=ids_BL, use_cache=False).logits[:, -1]
    cache = model(input_ids=ids_BL[:, :-1], use_cache=True).past_key_values
    last = model(input_ids=ids_BL[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
    tolerance = 1e-4 if ids_BL.device.type == "cpu" else 5e-2
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


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
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
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    base = OlmoeForCausalLM(config).to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    base.set_experts_implementation(args.implementation)
    ids_BL = torch.randint(3, VOCABULARY, (1, args.prompt), device=device)
    contestants = {}
    for name, peft_config in configs(args.experts, args.layers).items():
        model = adapted(base, peft_config).eval()
        check_cache(model, ids_BL)
        contestants[name] = decode(model, ids_BL, args.tokens)
    title = (
        f"{args.tokens} tokens one by one after {args.prompt}, {args.layers} layers of width {args.hidden}, top "
        f"{args.top_k} of {args.experts} experts ({args.implementation}), {device}"
    )
    times = interleave(contestants, rounds=args.rounds)
    report(title, times, BASELINE, args.output)


if __name__ == "__main__":
    main()
