"""Interleaved timing: contestants take turns in one process, so that a noisy machine disturbs them alike."""

from __future__ import annotations

import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

Times = dict[str, list[float]]


def interleave(contestants: dict[str, Callable[[], Any]], *, rounds: int, warm_up: int = 2) -> Times:
    """Time each contestant once per round.

    Args:
        contestants: Name -> one unit of work.
        rounds: Timed rounds; the order is reversed in every second one.
        warm_up: Rounds that are not timed.

    Returns:
        Name -> seconds per round: CPU time of this process, or time between CUDA events where there is a GPU.
    """
    times: Times = {name: [] for name in contestants}
    for round_index in range(-warm_up, rounds):
        order = list(contestants) if round_index % 2 == 0 else list(reversed(contestants))
        for name in order:
            elapsed = seconds_of(contestants[name])
            if round_index >= 0:
                times[name].append(elapsed)
    return times


def seconds_of(work: Callable[[], Any]) -> float:
    """Seconds of one unit of work.

    Args:
        work: What is timed.
    """
    if torch.cuda.is_available():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    before = time.process_time()
    work()
    return time.process_time() - before


def ratios(times: Times, baseline: str) -> dict[str, float]:
    """Median over the rounds of each contestant's time over the baseline's in the same round."""
    return {name: statistics.median(_by_round(own, times[baseline])) for name, own in times.items()}


def rows(times: Times, baselines: dict[str, str], frozen: str | None = None, **labels: object) -> list[dict[str, Any]]:
    """What was measured of each contestant, for a file.

    Args:
        times: Name -> seconds per round.
        baselines: Contestant -> name of the one that it is divided by; others have no ratio.
        frozen: Name of the model without an adapter, whose time is taken off for the ratio of what adapters add.
        **labels: Further entries of each row.

    Returns:
        Rows of contestant, median_s, and where there is a baseline over, ratio (median of the rounds), spread (their
        quartiles), and increment.
    """
    medians = {name: statistics.median(own) for name, own in times.items()}
    found = []
    for name, own in times.items():
        row: dict[str, Any] = {"contestant": name, **labels, "median_s": medians[name]}
        over = baselines.get(name)
        if over is not None:
            each = _by_round(own, times[over])
            quartiles = statistics.quantiles(each, n=4) if len(each) > 1 else [each[0]] * 3
            row |= {"over": over, "ratio": statistics.median(each), "spread": [quartiles[0], quartiles[2]]}
            if frozen is not None and name != frozen:
                added = medians[over] - medians[frozen]
                row["increment"] = (medians[name] - medians[frozen]) / added if added > 0 else None
        found.append(row)
    return found


def print_rows(title: str, found: list[dict[str, Any]]) -> None:
    """Print rows as a markdown table.

    Args:
        title: What was measured.
        found: Rows of `rows`.
    """
    print(f"\n{title}\n\n| contestant | median s | over | ratio | of what adapters add |\n|---|---|---|---|---|")
    for row in found:
        ratio, increment = row.get("ratio"), row.get("increment")
        shown = ["" if value is None else f"{value:.2f}" for value in (ratio, increment)]
        print(
            f"| {row['contestant']} | {row['median_s']:.4f} | {row.get('over', '')} | {' | '.join(shown)} |",
            flush=True,
        )


def write(output: str | None, title: str, found: list[dict[str, Any]], **further: object) -> None:
    """Write rows as JSON with machine, versions and command, where a path is given.

    Args:
        output: Path of the file; None writes none.
        title: What was measured.
        found: Rows of `rows`.
        **further: Other figures.
    """
    if output is None:
        return
    record = {"title": title, "rows": found, **further, **machine()}
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def report(
    title: str,
    times: Times,
    baseline: str,
    output: str | None,
    further: dict[str, object] | None = None,
) -> None:
    """Print a markdown table, and write it as JSON where a path is given.

    Args:
        title: What was measured.
        times: Name -> seconds per round.
        baseline: Name of the contestant that the others are divided by.
        output: Path of the JSON file.
        further: Other figures for that file.
    """
    found = rows(times, dict.fromkeys(times, baseline))
    print_rows(title, found)
    write(output, title, found, **(further or {}))


def machine() -> dict[str, object]:
    """Machine, versions and command of this run."""
    return {
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads(),
        "command": "python " + shlex.join(sys.argv),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }


def _by_round(own: list[float], base: list[float]) -> list[float]:
    return [t / b for t, b in zip(own, base, strict=True)]


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.machine()
