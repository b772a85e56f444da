"""What tools make of trained adapters, measured over seeds: composed, upcycled, distilled, pruned, compressed.

    python benchmarks/tools.py [--seeds 0 1 2] [--steps 100] [--output results.json] [--plot tools.svg]

A small model is pretrained on counting by two steps; each of two LoRAs learns counting by another step, in letters or
in numbers. Losses are of rows that no training has seen, half of them of each task.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from timing import write
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

import moe_peft
from moe_peft import tools

# Task -> first token, step, and the token that names the task; tokens are 20 letters, 20 numbers, and names.
OLD = {"letters by 1": (0, 1, 40), "numbers by 1": (20, 1, 41)}
NEW = {"letters by 3": (0, 3, 42), "numbers by 7": (20, 7, 43)}
SIZES = {"vocab_size": 48, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
HELD_OUT = 10**6
Batch = dict[str, torch.Tensor]
Figures = dict[str, float]


def batch_of(tasks: dict[str, tuple[int, int, int]], seed: int) -> Batch:
    """32 rows of [name, x, x + step, x + 2 step, ...] modulo 20, with labels from the third token on."""
    generator = torch.Generator().manual_seed(seed)
    task = torch.tensor(list(tasks.values()))[torch.arange(32) % len(tasks)]
    first, step, name = task.T[:, :, None]
    start = torch.randint(20, (32, 1), generator=generator)
    input_ids = torch.cat([name, first + (start + step * torch.arange(9)) % 20], dim=1)
    return {"input_ids": input_ids, "labels": input_ids.where(torch.arange(10) > 1, -100)}


def train(model: torch.nn.Module, tasks: dict[str, tuple[int, int, int]], steps: int, lr: float, seed: int) -> None:
    """AdamW on what requires a gradient; every seed has rows of its own."""
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        model(**batch_of(tasks, 1000 * seed + step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def loss(model: torch.nn.Module) -> float:
    """On rows of both new tasks that no training has seen."""
    return float(model.eval()(**batch_of(NEW, HELD_OUT)).loss)


def pretrained(seed: int, steps: int) -> LlamaForCausalLM:
    """The base model."""
    set_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4, pad_token_id=None, bos_token_id=None))
    train(model, OLD, steps, 3e-3, seed)
    return model


def figures(seed: int, steps: int) -> Figures:
    """Losses on the mixture of both tasks, of everything that is made, for one seed.

    Args:
        seed: Of models and rows.
        steps: Optimizer steps of each LoRA; other trainings are in proportion.
    """
    base = pretrained(seed, steps)
    fresh: Callable[[], LlamaForCausalLM] = lambda: copy.deepcopy(base)  # noqa: E731
    found = {"base": loss(base)}
    with tempfile.TemporaryDirectory() as folder:
        loras = {}
        for number, name in enumerate(NEW):
            lora = get_peft_model(fresh(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
            train(lora, {name: NEW[name]}, steps, 5e-3, seed)
            found[f"LoRA of {name}"] = loss(lora)
            loras[name] = f"{folder}/{number}"
            lora.save_pretrained(loras[name])
        found |= _composed(fresh, loras, Path(folder), steps, seed)
        found |= _upcycled(fresh, next(iter(loras.values())), Path(folder), steps, seed)
    return found


def _composed(
    fresh: Callable[[], LlamaForCausalLM], loras: dict[str, str], folder: Path, steps: int, seed: int
) -> Figures:
    config = moe_peft.RoutedConfig(router="dense", task_type="CAUSAL_LM")
    both = tools.compose(fresh(), loras, config, trained="router")
    found = {"composed, router as it starts": loss(both)}
    train(both, NEW, steps // 2, 1e-2, seed)
    found["composed, router trained"] = loss(both)
    texts, held_out = [batch_of(NEW, 1000 * seed + n) for n in range(8)], [batch_of(NEW, HELD_OUT)]
    settings: dict[str, Any] = {"rank": 8, "steps": steps, "learning_rate": 3e-3, "held_out": held_out}
    made = tools.distil_to_lora(both, folder / "distilled", texts, fresh_base=fresh, **settings)
    found["composed, its mean truncated to one LoRA"] = made.start.loss_after
    found["composed, distilled to one LoRA"] = loss(PeftModel.from_pretrained(fresh(), folder / "distilled"))
    both.save_pretrained(folder / "both")
    for name, fields in (
        ("up matrices", {}),
        ("up matrices, least error", {"alpha": None}),
        ("all matrices, least error", {"alpha": None, "from_zero": True}),
    ):
        small = folder / name.replace(" ", "")
        sizes = tools.compress_adapter(folder / "both", small, **fields)
        tools.decompress_adapter(small, small / "back")
        found[f"composed, compressed: {name}"] = loss(PeftModel.from_pretrained(fresh(), small / "back"))
        found[f"bytes over compressed bytes: {name}"] = sizes.bytes_before / sizes.bytes_after
    return found


def _upcycled(fresh: Callable[[], LlamaForCausalLM], lora: str, folder: Path, steps: int, seed: int) -> Figures:
    """One LoRA as several experts against the LoRA itself, after the same further steps on both tasks."""
    further = PeftModel.from_pretrained(fresh(), lora, is_trainable=True)
    train(further, NEW, steps // 2, 2e-3, seed + 50)
    found = {"LoRA trained further on both": loss(further)}
    for rho in (0.0, 0.5):
        set_seed(seed)
        four = tools.upcycle(fresh(), lora, num_experts=4, rho=rho)
        start = tools.router_norms(four)
        train(four, NEW, steps // 2, 2e-3, seed + 50)
        found[f"upcycled to 4 experts, rho {rho:g}, trained as far"] = loss(four)
    batches = [batch_of(NEW, 1000 * seed + n) for n in range(4)]
    for by, fields in (("importance", {}), ("importance, merged", {"merge": True}), ("router_change", {})):
        four.set_adapter("default")
        how: dict[str, Any] = dict(fields)
        if by == "router_change":
            how["initial_norms"] = start
        tools.prune_experts(four, by.replace(", ", "_"), 2, batches, by=by.partition(",")[0], **how)
        found[f"2 of the 4 by {by}"] = loss(four)
    return found


def table(found: list[Figures]) -> Iterator[dict[str, str]]:
    """A row for each figure, with its value for every seed."""
    for name in found[0]:
        values = [own[name] for own in found]
        form = "{:.1f}" if name.startswith("bytes") else "{:.3f}"
        yield {
            "what": name,
            "median": form.format(statistics.median(values)),
            "each seed": ", ".join(map(form.format, values)),
        }


def claims(found: list[Figures]) -> dict[str, list[bool]]:
    """What the tools are for -> whether it holds, for each seed."""
    routed, distilled = "composed, router trained", "composed, distilled to one LoRA"
    singles = [f"LoRA of {name}" for name in NEW]
    further = "LoRA trained further on both"
    return {
        "composed beats each LoRA on the mixture": [f[routed] < min(f[own] for own in singles) for f in found],
        "upcycled (rho 0.5) is no worse than its LoRA after the same steps": [
            f["upcycled to 4 experts, rho 0.5, trained as far"] <= f[further] for f in found
        ],
        "distilled keeps 90% of what routing gained over the better LoRA": [
            min(f[own] for own in singles) - f[distilled] >= 0.9 * (min(f[own] for own in singles) - f[routed])
            for f in found
        ],
    }


def draw(path: str, found: list[Figures]) -> None:
    """Bars of median losses, with a dot for each seed.

    Args:
        path: Of the SVG.
        found: Figures of each seed.
    """
    names = [name for name in found[0] if not name.startswith("bytes")]
    largest = max(max(own[name] for name in names) for own in found)
    height, left, width = 22, 330, 380
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 60} {height * len(names) + 40}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for number, name in enumerate(names):
        y, values = height * number + 10, [own[name] for own in found]
        bar = width * statistics.median(values) / largest
        parts.append(f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{name}</text>')
        parts.append(f'<rect x="{left}" y="{y + 3}" width="{bar:.1f}" height="{height - 8}" fill="#7986cb"/>')
        for value in values:
            parts.append(f'<circle cx="{left + width * value / largest:.1f}" cy="{y + 10}" r="3" fill="#1a237e"/>')
        parts.append(f'<text x="{left + width + 8}" y="{y + 14}">{statistics.median(values):.3f}</text>')
    y = height * len(names) + 30
    parts.append(f'<text x="{left}" y="{y}">loss on both tasks; bars are medians, dots are seeds</text></svg>')
    Path(path).write_text("\n".join(parts) + "\n", encoding="utf-8")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output")
    parser.add_argument("--plot")
    args = parser.parse_args()
    torch.set_num_threads(1)
    # Seeds do not touch each other, and each is small: a process for each, which has what is imported.
    work = [args.seeds, [args.steps] * len(args.seeds)]
    if len(args.seeds) == 1:
        found = list(map(figures, *work))
    else:
        with ProcessPoolExecutor(len(args.seeds), mp_context=get_context("fork")) as processes:
            found = list(processes.map(figures, *work))
    rows = list(table(found))
    for row in rows:
        print(" | ".join(row.values()), flush=True)
    holds = {name: f"{sum(own)} of {len(own)} seeds" for name, own in claims(found).items()}
    print(holds)
    seeds = ", ".join(map(str, args.seeds))
    write(args.output, f"Losses on both tasks, {args.steps} steps, seeds {seeds}", rows, claims=holds)
    if args.plot:
        draw(args.plot, found)


if __name__ == "__main__":
    main()
