"""A training step with each registered part over one of plain LoRA: what a choice of parts costs at one size.

    python benchmarks/catalogue.py [--tokens 256] [--hidden 256] [--rounds 5] [--output results.json]
    python benchmarks/catalogue.py --only tree top_p --update --output results.json     only these rows anew

Every contestant adapts the FFN of the same Llama-like model: a part stands with the usual other parts (dense softmax
routing, linear scores, low-rank experts, no router loss), or with the first that give what it needs. E experts of rank
r stand against LoRA of rank E r. A step is forward, backward and AdamW. Where a ratio is above `NOTEWORTHY`, the row
says why.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from dense_models import FFN, LORA, adapted, backbone
from peft import LoraConfig
from timing import interleave, machine, print_rows, rows, write
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
    "balanced_assignment": "an auction assigns the tokens of each sequence on the host, round by round",
    "compete": "timed is a step in which all experts compete, which is one in ten by default",
}
# Options under which a part does in each timed step what it is there for.
OPTIONS: dict[str, dict[str, Any]] = {"compete": {"router_args": {"compete_rate": 1.0, "warm_up": 0}}}


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
    options = OPTIONS.get(choice["scorer"], {})
    return {**choice, **targets, **options, "allow_non_causal": not all(part.causal for part in parts)}


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


def with_others(found: list[dict[str, Any]], before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """New rows and those of the other registered parts, in the order of the registries.

    Args:
        found: Rows of `measured`.
        before: Of a file.
    """
    rows_by_part = {(own["axis"], own["contestant"]): own for own in (*before, *found)}
    return [rows_by_part[axis, name] for axis, name, _ in choices() if (axis, name) in rows_by_part]


def update(output: Path, found: list[dict[str, Any]]) -> None:
    """Put new rows into a file of this machine and these versions, which keeps its others and its command.

    Args:
        output: The file.
        found: Rows of `measured`.
    """
    record = json.loads(output.read_text(encoding="utf-8"))
    other = [name for name, value in machine().items() if name != "command" and record[name] != value]
    if other:
        raise SystemExit(f"{output} is of another {other[0]}, so that its rows do not stand beside these.")
    record["rows"] = with_others(found, record["rows"])
    output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


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
    parser.add_argument("--update", action="store_true", help="keep the output's rows of other parts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = measured(args)
    title = (
        f"Training step, {args.layers} layer of width {args.hidden}, E={args.experts} experts of rank {args.r} on the "
        f"FFN, {args.tokens} tokens"
    )
    print_rows(title, found)
    if args.update:
        update(Path(args.output), found)
    else:
        write(args.output, title, found)


if __name__ == "__main__":
    main()
