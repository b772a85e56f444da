"""The routed sum alone: masked dense GEMMs against the ops that skip work, one of which "auto" chooses.

    python benchmarks/routed_sum.py [--tokens 256] [--dtype bfloat16] [--output results.json]

Several tokens are run forward and backward, a single one forward. The ops are compared before anything is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from timing import interleave, report

from moe_peft.ops import IMPLEMENTATIONS, Work, choose
from moe_peft.types import Routing

BASELINE = "dense"
OPS = ("dense", "grouped", "segment")
FEW_TOKENS = 16


def routed_sum(name: str, args: argparse.Namespace, device: torch.device) -> Callable[[], torch.Tensor]:
    """One call of an op on random numbers, the same for every op."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(args.tokens, args.width), (args.experts, args.r, args.width), (args.experts, args.r, args.out)]
    x, A, B, base = (
        torch.randn(size, generator=generator).to(device, getattr(torch, args.dtype))
        for size in (*sizes, (args.tokens, args.out))
    )
    logits = torch.randn(args.tokens, args.experts, generator=generator).to(device)
    trained = [tensor.requires_grad_(args.tokens > 1) for tensor in (x, A, B)]

    def run() -> torch.Tensor:
        probs = logits.softmax(-1)
        weights, experts = probs.topk(args.top_k, dim=-1)
        routing = Routing(weights=weights, experts=experts, logits=logits, probs=probs)
        out: torch.Tensor = IMPLEMENTATIONS[name](x, base, A, B, routing, scaling=0.1)
        if out.requires_grad:
            for tensor in trained:
                tensor.grad = None
            out.sum().backward()
        return out.detach()

    return run


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--out", type=int, default=2048)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--output")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = (*OPS, "gather") if args.tokens <= FEW_TOKENS else OPS
    contestants = {name: routed_sum(name, args, device) for name in names}
    expected = contestants[BASELINE]()
    # Two ways round to 16 bit in two orders: a rank's product is some hundreds of the values' size.
    tolerance = 1e-4 if args.dtype == "float32" else 5e-2
    for run in contestants.values():
        torch.testing.assert_close(run(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    chosen = choose(
        Work(
            num_tokens=args.tokens,
            num_experts=args.experts,
            num_slots=args.top_k,
            r=args.r,
            dtype=getattr(torch, args.dtype),
            device_type=device.type,
        )
    )
    sizes = f"{args.tokens} tokens, top {args.top_k} of {args.experts}, r={args.r}, {args.dtype}, {device}"
    title = f"{sizes}; auto: {chosen}"
    report(title, interleave(contestants, rounds=args.rounds), BASELINE, args.output, {"auto": chosen})


if __name__ == "__main__":
    main()
