"""Interleaved timing: contestants take turns in one process, so that a noisy machine disturbs them alike."""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch


def interleave(contestants: dict[str, Callable[[], None]], *, rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Time each contestant once per round.

    Args:
        contestants: Name -> one unit of work.
        rounds: Timed rounds; the order is reversed in every second one.
        warm_up: Rounds that are not timed.

    Returns:
        Name -> seconds per round: CPU time of this process, or time between CUDA synchronisations where there is a
        GPU.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for round_index in range(-warm_up, rounds):
        order = list(contestants) if round_index % 2 == 0 else list(reversed(contestants))
        for name in order:
            start = _now()
            contestants[name]()
            elapsed = _now() - start
            if round_index >= 0:
                times[name].append(elapsed)
    return times


def ratios(times: dict[str, list[float]], baseline: str) -> dict[str, float]:
    """Median over the rounds of each contestant's time over the baseline's in the same round."""
    base = times[baseline]
    return {name: statistics.median(t / b for t, b in zip(own, base, strict=True)) for name, own in times.items()}


def report(
    title: str,
    times: dict[str, list[float]],
    baseline: str,
    output: str | None,
    further: dict[str, object] | None = None,
) -> None:
    """Print a markdown table; where a path is given, write the figures as JSON with machine, versions and command.

    Args:
        title: What was measured.
        times: Name -> seconds per round.
        baseline: Name of the contestant that the others are divided by.
        output: Path of the JSON file.
        further: Other figures for that file.
    """
    relative = ratios(times, baseline)
    print(f"\n{title}\n\n| contestant | median s | over {baseline} |\n|---|---|---|")
    for name, own in times.items():
        print(f"| {name} | {statistics.median(own):.4f} | {relative[name]:.2f} |")
    if output:
        record = {
            "title": title,
            "times_s": times,
            "ratios": relative,
            "baseline": baseline,
            **(further or {}),
            **machine(),
        }
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(json.dumps(record, indent=1), encoding="utf-8")


def machine() -> dict[str, object]:
    """Machine, versions and command of this run."""
    return {
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads(),
        "command": " ".join(sys.argv),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "peft-moe")},
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.machine()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()
