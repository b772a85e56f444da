"""What is aimed at, beside what has been measured: one row a target, from the files under benchmarks/results."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]
TOP_2 = "top-2, balance and z-loss"
DENSE = ("LoRAMoE", TOP_2, "SiRA", "MoLORA")
STOCK, FAST, OWN = "stock target_parameters", "accelerate_expert_lora", "ExpertLoraConfig"
LOOP = "loop over experts, balance"


@dataclass(frozen=True)
class Target:
    """One promise and where its figures stand.

    Attributes:
        work: What is timed.
        over: What it is divided by.
        file: Name of the file with the rows, without its ending.
        limit: What is aimed at.
        names: Contestants whose rows count.
        only: Entries that those rows have.
        figure: Entry of a row that holds the figure.
        at_least: Whether more is better.
        form: How a figure is shown.
        made: Makes the figure of a row and all rows of the file; None where the row holds it.
    """

    work: str
    over: str
    file: str
    limit: float
    names: Sequence[str]
    only: Row = field(default_factory=dict)
    figure: str = "ratio"
    at_least: bool = False
    form: str = "{:.2f}"
    made: Callable[[Row, list[Row]], float] | None = None

    def found(self, results: Path) -> list[tuple[Row, float]]:
        """The rows that count, with their figures.

        Args:
            results: Folder of the files.

        Raises:
            LookupError: The file has no row of a contestant.
        """
        rows = json.loads((results / f"{self.file}.json").read_text(encoding="utf-8"))["rows"]
        own = []
        for name in self.names:
            fitting = [r for r in rows if r["contestant"] == name and self.only.items() <= r.items()]
            if len(fitting) != 1:
                raise LookupError(f"{self.file}.json has {len(fitting)} rows of {name} with {self.only}, not one.")
            row = fitting[0]
            own.append((row, self.made(row, rows) if self.made else row[self.figure]))
        return own

    def cells(self, results: Path) -> list[str]:
        """Work, over, limit, what was measured, and which contestants miss the limit.

        Args:
            results: Folder of the files.
        """
        found = self.found(results)
        shown, missed = [], []
        for row, figure in found:
            text = self.form.format(figure)
            if self.figure == "ratio" and self.made is None and "spread" in row:
                text += " ({:.2f} to {:.2f})".format(*row["spread"])
            shown.append(text if len(found) == 1 else f"{row['contestant'].split(',')[0]} {text}")
            rounded = float(self.form.format(figure).rstrip("x%us "))
            beyond = rounded < self.limit if self.at_least else rounded > self.limit
            if beyond:
                missed.append(row["contestant"].split(",")[0])
        sign = "at least" if self.at_least else "at most"
        reached = "yes" if not missed else "no" if len(missed) == len(found) else f"not by {', '.join(missed)}"
        return [self.work, self.over, f"{sign} {self.form.format(self.limit)}", "; ".join(shown), reached, self.file]


def _saved(row: Row, rows: list[Row]) -> float:
    """Per cent of the bytes that stock peft saves beyond attention-only LoRA."""
    stock = next(r for r in rows if r["contestant"] == STOCK and r["work"] == "memory")
    return 100.0 * row["saved_beyond_attention"] / stock["saved_beyond_attention"]


def _over_loop(row: Row, rows: list[Row]) -> float:
    """How many times faster a step is than one with a loop over experts."""
    loop: float = next(r for r in rows if r["contestant"] == LOOP)["ratio"]
    return loop / float(row["ratio"])


def _added_over_loop(row: Row, rows: list[Row]) -> float:
    """The same of what both add to the frozen model."""
    loop: float = next(r for r in rows if r["contestant"] == LOOP)["increment"]
    return loop / float(row["increment"])


def _steps() -> list[Target]:
    """A training step over LoRA of as many ranks, whole and without the frozen model."""
    files = {2048: "train_step_2048", 256: "train_step", 16: "train_step"}
    whole, added = {2048: 0.97, 256: 1.03, 16: 1.12}, {2048: 0.8, 256: 1.1, 16: 1.9}
    made = [
        Target(f"training step, {tokens:,} tokens", "peft LoRA", files[tokens], limit, DENSE, {"tokens": tokens})
        for tokens, limit in whole.items()
    ]
    for tokens, limit in added.items():
        work = f"what it adds, {tokens:,} tokens"
        made.append(Target(work, "peft LoRA", files[tokens], limit, DENSE, {"tokens": tokens}, "increment"))
    return made


def _experts(file: str, train: float, token: float) -> list[Target]:
    """LoRA on experts over stock peft's, and over LoRA on attention alone."""
    both, made = (FAST, OWN), []
    count = {"expert_lora": 64, "expert_lora_bfloat16": 64, "expert_lora_8_experts": 8}[file]
    dtype = ", bfloat16" if "bfloat16" in file else ""
    for work, limit in (("training step", train), ("one decoded token", token)):
        title, own = f"LoRA on {count} experts, {work}{dtype}", {"work": work}
        made.append(Target(title, "faster than stock", file, limit, both, own, "stock_over_this", True, "{:.1f}x"))
        if count == 64:
            made.append(Target(title, "LoRA on attention", file, 1.05, both, own))
    if count == 64:
        title = f"LoRA on {count} experts, bytes saved{dtype}"
        own = {"work": "memory"}
        made.append(Target(title, "stock's beyond attention", file, 10.0, both, own, form="{:.0f}%", made=_saved))
    return made


def _loops() -> list[Target]:
    """A training step over one with a loop over experts, whole and without the frozen model."""
    sizes = {"train_step_loop": "E=8, r=4, 2,048 tokens", "train_step_32_experts": "E=32, r=4, 256 tokens"}
    asked = (
        ("training step", "train_step_loop", 2.2, _over_loop),
        ("training step", "train_step_32_experts", 5.0, _over_loop),
        ("what it adds", "train_step_loop", 13.0, _added_over_loop),
    )
    return [
        Target(
            f"{work}, {sizes[file]}",
            "faster than a loop",
            file,
            limit,
            DENSE,
            at_least=True,
            form="{:.1f}x",
            made=made,
        )
        for work, file, limit, made in asked
    ]


TARGETS: list[Target] = [
    *_steps(),
    Target("training step, 16 tokens, bfloat16", "peft LoRA", "train_step_bfloat16", 1.12, DENSE, {"tokens": 16}),
    Target("compiled training step", "compiled peft LoRA", "train_step_compiled", 1.0, DENSE),
    Target("decoding, dense model", "peft LoRA", "decode", 1.05, DENSE, {"backbone": "dense"}),
    Target("decoding, vectors", "peft (IA)3", "decode", 1.10, ("MoV",), {"backbone": "dense"}),
    *_experts("expert_lora", 2.5, 30.0),
    *_experts("expert_lora_8_experts", 1.2, 4.0),
    *_experts("expert_lora_bfloat16", 2.5, 30.0),
    *(
        Target(f"top 2 of 64 experts, r=16, {tokens:,} tokens", "all experts", f"routed_sum_{tokens}", limit, (name,))
        for tokens, limit, name in ((256, 0.4, "grouped"), (2048, 0.4, "grouped"), (1, 0.3, "gather"))
    ),
    Target(
        "around a block of 64 experts, training",
        "frozen block",
        "moe_block",
        1.10,
        ("PERFT-R top 2 of 8, r=16, balance on", "PERFT-E r=4"),
    ),
    Target("ESFT, 10% of the experts, training", "frozen block", "moe_block", 1.15, ("ESFT, 10% of the experts",)),
    Target("PERFT-E, decoding", "LoRA on attention", "decode", 1.05, ("PERFT-E r=4",), {"backbone": "moe"}),
    *_loops(),
    Target(
        "telemetry, us a place and step",
        "",
        "telemetry",
        60.0,
        ("top-2, losses and telemetry in every step",),
        {},
        "telemetry_us",
        False,
        "{:.0f}",
    ),
]


def targets(results: Path) -> str:
    """The table of all targets.

    Args:
        results: Folder of the files.
    """
    lines = ["| work | over | aimed at | measured | reached | table |", "|---|---|---|---|---|---|"]
    for target in TARGETS:
        lines.append(f"| {' | '.join(target.cells(results))} |")
    return "\n".join([*lines, ""])
