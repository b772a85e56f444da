"""Compare methods: the same data, steps and number of trained parameters, several seeds, a table and a plot.

python train/compare.py --config configs/runs/quickstart.yaml --moe_config loramoe --moe_config lora --seeds 0 1 2
moe-peft compare --config a.yaml --config b.yaml --output_dir outputs/compare

Every run is a process of its own on one device, so that its time and memory are its own. In the output folder:
`compare.json` (everything that was measured), `compare.md` (the table), `compare.png`, and each run's adapter and log.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from comparable import arms_of, check_runs, check_shared, parse, task_of
from comparison import METRICS, markdown, plot, table_of, without_nan
from dry_run import model_without_weights
from equal_sizes import Size, equal_size
from rates import FACTORS
from running import run

from moe_peft.files import write_text
from moe_peft.messages import shown

# What a comparison sets itself: held-out loss from step 0 on, and nothing beside the run.
FIXED = {"eval_strategy": "steps", "eval_steps": "0.2", "eval_on_start": "true", "save_strategy": "no"}
FIXED |= {"report_to": "none", "push_to_hub": "false", "disable_tqdm": "true"}
SEEDS = [0, 1, 2]
Measure = Callable[[str, list[str], Path], dict[str, Any]]


def own_flags() -> argparse.ArgumentParser:
    """The parser of the comparison's own flags; all others go to every run."""
    parser = argparse.ArgumentParser(
        prog=os.environ.get("MOE_PEFT_PROGRAM") or "compare.py",
        description="Train several methods on the same data for the same steps with the same number of trained "
        "parameters, with several seeds each, and compare loss, held-out loss, time and memory. Flags that are not "
        "listed here go to every run, as --max_steps 200 or --test_split_size 0.1.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", action="append", default=[], metavar="RUN", help="file or name of a run; several are compared")
    add("--moe_config", action="append", default=[], metavar="METHOD", help="the same of a method, with every RUN")
    add("--script", default="sft", choices=sorted(FACTORS), help="what trains (default: sft)")
    add("--seeds", nargs="+", type=int, default=SEEDS, metavar="SEED", help="seeds of every method (default: 0 1 2)")
    add("--match", default="true", choices=("true", "false"), help="choose ranks so that sizes are equal")
    add("--parameters", type=int, help="trained parameters of every method (default: those of the first)")
    add("--output_dir", default="outputs/compare", help="folder of table, plot, logs and adapters")
    return parser


class Parser:
    """What `running.run` asks of a parser."""

    prog = "compare.py"

    def parse_args_and_config(self) -> tuple[list[str]]:
        """The words of the command line."""
        return (sys.argv[1:],)


def main(argv: Sequence[str], measure: Measure | None = None) -> dict[str, Any]:
    """Compare.

    Args:
        argv: The words of the command line.
        measure: Runs one training and returns what it measured; None starts a process for it.

    Returns:
        What is written as JSON.

    Raises:
        ValueError: Runs cannot be compared, or one of them failed.
    """
    given, rest = own_flags().parse_known_args(list(argv))
    if len(set(given.seeds)) < len(given.seeds):
        raise ValueError(f"--seeds {shown(given.seeds)}: every seed once.")
    if min(given.seeds) < 0 or max(given.seeds) >= 2**32:
        raise ValueError(f"--seeds {shown(given.seeds)}: whole numbers from 0 to {2**32 - 1}.")
    if given.parameters is not None and given.parameters < 1:
        raise ValueError(f"--parameters {given.parameters} must be a positive number of trained parameters.")
    folder = Path(given.output_dir)
    if folder.is_file():
        raise ValueError(f"--output_dir {given.output_dir} is a file. Name a folder.")
    arms = arms_of(given.config, given.moe_config, rest)
    parsed = {arm.name: parse(given.script, arm) for arm in arms}
    check_shared(parsed)
    check_runs(parsed, given.script)
    sizes = sizes_of(parsed, given.script, given.match == "true", given.parameters)
    for name, size in sizes.items():
        print(f"{name}: {size}", flush=True)
    results = {arm.name: [] for arm in arms}
    for seed in given.seeds:
        for arm in arms:
            out = folder / arm.name / f"seed-{seed}"
            words = [*arm.words, *fixed(parsed[arm.name]), *sizes[arm.name].words]
            words += ["--seed", str(seed), "--output_dir", str(out)]
            found = (measure or measured)(given.script, words, out)
            results[arm.name].append({"seed": seed, **found})
            print(f"{arm.name}, seed {seed}: {_said(found, given.script)}", flush=True)
    return report(results, given.script, folder)


def report(results: dict[str, list[dict[str, Any]]], script: str, folder: Path) -> dict[str, Any]:
    """Write and print what was measured.

    Args:
        results: Method -> what each of its runs measured.
        script: What trained.
        folder: Output folder.

    Returns:
        What is written as JSON.
    """
    rows = table_of(results, script)
    found = {"script": script, "table": rows, "runs": results}
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "compare.json", json.dumps(without_nan(found), indent=2, allow_nan=False) + "\n")
    write_text(folder / "compare.md", markdown(rows) + "\n")
    print(f"\n{markdown(rows)}\n")
    try:
        plot(results, script, folder / "compare.png")
    except ImportError as error:
        print(f"No plot: {error}")
    print(f"Table, plot, logs and adapters are in {folder}.", flush=True)
    return found


def sizes_of(parsed: dict[str, tuple[Any, ...]], script: str, match: bool, parameters: int | None) -> dict[str, Size]:
    """The sizes of the methods, equal where they can be.

    Args:
        parsed: Method -> what its script's parser returned.
        script: "sft", "dpo", ...
        match: Whether to change sizes.
        parameters: Trained parameters of every method; None takes those of the first.
    """
    task_type = task_of(script)
    _, training_args, model_args, *_ = next(iter(parsed.values()))
    _, model = model_without_weights(model_args, training_args, task_type)
    sizes: dict[str, Size] = {}
    for name, own in parsed.items():
        target = parameters or (next(iter(sizes.values())).parameters if sizes else None)
        sizes[name] = equal_size(model, own[-1], task_type, target if match else None)
    return sizes


def fixed(parsed: tuple[Any, ...]) -> list[str]:
    """Words with which every run measures the same.

    Args:
        parsed: What the script's parser returned.
    """
    known = {name for own in parsed for name in vars(own)}
    values = {**FIXED, "moe_report": "false", "logging_steps": "0.05"}
    if "logging_steps" in parsed[-1].given:
        values.pop("logging_steps")
    return [word for name, value in values.items() if name in known for word in (f"--{name}", value)]


def measured(script: str, words: list[str], folder: Path) -> dict[str, Any]:
    """Run one training in a process of its own.

    Args:
        script: "sft", "dpo", ...
        words: Of its command line.
        folder: Of its output, its log and its result.

    Returns:
        What `measured_run.measure` returned there.

    Raises:
        ValueError: It failed; the last line of its log is shown.
    """
    folder.mkdir(parents=True, exist_ok=True)
    result, log = folder / "measured.json", folder / "log.txt"
    result.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).with_name("measured_run.py")), script, str(result), *words]
    environment = {"CUDA_VISIBLE_DEVICES": "0", **os.environ}  # one process on one device
    with open(log, "w", encoding="utf-8") as output:
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment).returncode
    if code != 0 or not result.is_file():
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise ValueError(f"A run ended with exit code {code}: {lines[-1] if lines else 'no output'} (see {log})")
    return json.loads(result.read_text(encoding="utf-8"))


def _said(found: dict[str, Any], script: str) -> str:
    _, held_out = METRICS[script]
    last = found["curves"].get(held_out, [])
    value = f"{held_out} {last[-1][1]:.4f}, " if last else ""
    return f"{value}{found['seconds']:.1f} s for {found['steps']} steps"


if __name__ == "__main__":
    run(Parser, main)
