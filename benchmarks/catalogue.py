"""A training step with each registered part over one of plain LoRA: what a choice of parts costs at one size.

    python benchmarks/catalogue.py [--tokens 256] [--hidden 256] [--rounds 5] [--output results.json]

Every contestant adapts the FFN of the same Llama-like model: a part stands with the usual other parts (dense softmax
routing, linear scores, low-rank experts, no router loss), or with the first that give what it needs. E experts of rank
r stand against LoRA of rank E r. A step is forward, backward and AdamW. Where a ratio is above `NOTEWORTHY`, the row
says why.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from dense_models import FFN, LORA, adapted, backbone
from peft import LoraConfig
from timing import interleave, print_rows, rows, write
from torch import nn

import moe_peft
from moe_peft.experts import EXPERTS
from moe_peft.losses import LOSSES
from moe_peft.routers import GATES, ROUTERS, SCORERS, SELECTORS, router_gives, router_needs, router_parts

NOTEWORTHY = 1.3
USUAL = {"router": "dense", "scorer": "linear", "gate": "softmax", "experts": "low_rank"}
AXES: dict[str, dict[str, Any]] = {"router": {**SELECTORS, **ROUTERS}, "scorer": SCORERS, "gate": GATES}
AXES["experts"] = EXPERTS
# Why parts cost more than plain LoRA of as many parameters.
REASONS = {
    "ffn_lora": "the FFN's own products run once for each chosen expert, as in the paper",
}


def fits(choice: dict[str, str]) -> bool:
    """Whether parts stand together."""
    return router_needs(*_router(choice)) <= EXPERTS[choice["experts"]].gives


def choice_for(axis: str, name: str) -> dict[str, str] | None:
    """The usual parts with one of another name, and further ones where it needs them; None where nothing helps."""
    own = {**USUAL, axis: name}
    if fits(own):
        return own
    for other in (key for key in AXES if key != axis):
        for further in AXES[other]:
            if fits({**own, other: further}):
                return {**own, other: further}
    return None


def fields_of(choice: dict[str, str]) -> dict[str, Any]:
    """Further fields that a choice needs."""
    placement = EXPERTS[choice["experts"]].placement
    targets = {"target_modules": FFN} if placement is None else {"wraps": "block"}
    parts = *router_parts(*_router(choice)), EXPERTS[choice["experts"]]
    return {**choice, **targets, "allow_non_causal": not all(part.causal for part in parts)}


def choices() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Axis, name and fields of each contestant."""
    for axis, registry in AXES.items():
        for name in registry:
            found = choice_for(axis, name)
            if found is not None:
                yield axis, name, fields_of(found)
    for name, loss in LOSSES.items():
        found = next((own for own in _usual_first() if fits(own) and loss.needs <= router_gives(*_router(own))), None)
        if found is not None:
            yield "loss", name, {**fields_of(found), "losses": {name: 0.01}}


def _usual_first() -> Iterator[dict[str, str]]:
    """Choices that differ from the usual one by a selector, then by a scorer."""
    for axis, names in (("router", ("dense", "top_k", *SELECTORS)), ("scorer", SCORERS)):
        yield from ({**USUAL, axis: name} for name in names)


def _router(choice: dict[str, str]) -> tuple[str, str, str]:
    return choice["router"], choice["scorer"], choice["gate"]


def training_step(model: nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """One forward, backward and AdamW step on a fixed batch, with what parts do after it."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model.enable_input_require_grads()
    model.train()
    routed = isinstance(model.peft_config["default"], moe_peft.RoutedConfig)

    def step() -> None:
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if routed:
            moe_peft.after_step(model)

    return step


def measured(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each registered entry; a few take turns with LoRA at a time, so that few models are alive."""
    base = backbone(args.hidden, args.layers, torch.float32)
    device = next(base.parameters()).device
    input_ids = torch.randint(1, 2048, (2, args.tokens // 2), device=device)
    batch, found = {"input_ids": input_ids}, []
    sizes = {"num_experts": args.experts, "r": args.r, "router_aux_loss_coef": 0.0}
    rank = args.experts * args.r
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=FFN, task_type="CAUSAL_LM")
    every = [own for own in choices() if args.only is None or own[1] in args.only]
    for start in range(0, len(every), args.together):
        steps = {LORA: training_step(adapted(base, lora), batch)}
        names: dict[str, tuple[str, str]] = {}
        for axis, name, fields in every[start : start + args.together]:
            config = moe_peft.RoutedConfig(task_type="CAUSAL_LM", **sizes, **fields)
            tasks = {"task_type": torch.tensor([0, 1], device=device)} if config.group_columns else {}
            steps[f"{axis} {name}"] = training_step(adapted(base, config), {**batch, **tasks})
            names[f"{axis} {name}"] = (axis, name)
        times = interleave(steps, rounds=args.rounds)
        for own in rows(times, dict.fromkeys(times, LORA)):
            if own["contestant"] in names:
                axis, name = names[own["contestant"]]
                reason = REASONS.get(name, "") if own["ratio"] > NOTEWORTHY else ""
                found.append({**own, "contestant": name, "axis": axis, "why": reason})
        gc.collect()
    return found


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--r", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--together", type=int, default=12, help="contestants that take turns with LoRA")
    parser.add_argument("--only", nargs="+", help="names of parts")
    parser.add_argument("--output")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = measured(args)
    title = (
        f"Training step, {args.layers} layer of width {args.hidden}, E={args.experts} experts of rank {args.r} on the "
        f"FFN, {args.tokens} tokens"
    )
    print_rows(title, found)
    write(args.output, title, found)


if __name__ == "__main__":
    main()
