"""How the work of a routed layer grows: with the experts at a constant sum of ranks, with tokens, and with layers.

    python benchmarks/growth.py [--output results.json] [--plot growth.svg]

Forward and backward of linear layers of one width, each with a mixture on it, against stock peft's LoRA of the same
number of ranks. Growth is linear in tokens and layers, and flat in the experts.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from timing import interleave, write
from torch import nn

import moe_peft

RANKS = 64
EXPERTS, TOKENS, LAYERS = (1, 2, 4, 8, 16, 32, 64), (16, 64, 256, 1024, 4096), (1, 2, 4, 8)
LORA, MIXTURE = f"peft LoRA r={RANKS}", f"LoRAMoE, ranks of all experts {RANKS}"


def layers(width: int, number: int) -> nn.Module:
    """Linear layers one after the other."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(number))).to(device)


def step(width: int, number: int, num_experts: int | None, tokens: int) -> Callable[[], None]:
    """Forward and backward to the input, of a mixture or of plain LoRA without a number of experts."""
    torch.manual_seed(0)
    names = [str(index) for index in range(number)]
    config = (
        LoraConfig(r=RANKS, target_modules=names)
        if num_experts is None
        else moe_peft.LoraMoeConfig(
            r=RANKS // num_experts, num_experts=num_experts, target_modules=names, lora_dropout=0.0
        )
    )
    model = get_peft_model(layers(width, number), config).train()
    x = torch.randn(1, tokens, width, device="cuda" if torch.cuda.is_available() else "cpu")

    def run() -> None:
        leaf = x.detach().requires_grad_()
        model(leaf).sum().backward()
        model.zero_grad(set_to_none=True)

    return run


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of axis, value, and seconds of the mixture and of LoRA."""
    found = []
    axes = {
        "experts": [(value, (1, value, args.tokens)) for value in EXPERTS],
        "tokens": [(value, (1, 8, value)) for value in TOKENS],
        "layers": [(value, (value, 8, args.tokens)) for value in LAYERS],
    }
    for axis, points in axes.items():
        for value, (number, num_experts, tokens) in points:
            works = {
                MIXTURE: step(args.width, number, num_experts, tokens),
                LORA: step(args.width, number, None, tokens),
            }
            times = interleave(works, rounds=args.rounds)
            medians = {name: statistics.median(own) for name, own in times.items()}
            print(f"| {axis} | {value} | {medians[MIXTURE]:.4f} | {medians[LORA]:.4f} |", flush=True)
            found.append({"axis": axis, "value": value, "mixture_s": medians[MIXTURE], "lora_s": medians[LORA]})
    return found


def plot(found: list[dict[str, Any]], path: str) -> None:
    """Draw the three curves beside each other."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(10, 3), layout="constrained")
    for panel, axis in zip(panels, ("experts", "tokens", "layers"), strict=True):
        own = [row for row in found if row["axis"] == axis]
        values = [row["value"] for row in own]
        for key, label in (("mixture_s", MIXTURE), ("lora_s", LORA)):
            panel.plot(values, [1000 * row[key] for row in own], marker="o", label=label)
        panel.set(
            xscale="log", xticks=values, xticklabels=values, xlabel=axis, ylim=(0, None) if axis == "experts" else None
        )
        if axis != "experts":
            panel.set_yscale("log")
    panels[0].set_ylabel("ms, forward and backward")
    panels[0].legend(fontsize="small")
    figure.savefig(path)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=256, help="tokens of the other two axes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output")
    parser.add_argument("--plot", help="path of a picture, .svg or .png")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = measure(args)
    write(args.output, f"Growth, linear layers of width {args.width}", found)
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
