"""One run of a comparison, in a process of its own: trains by a script, and writes what it measured.

python train/measured_run.py SCRIPT RESULT.json [flags of the script]
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from running import run

from moe_peft.files import write_text

# Curves that a comparison reads from the trainer's log, where they are there.
CURVES = ("loss", "eval_loss", "reward", "eval_reward")


def measure(script: str, words: Sequence[str]) -> dict[str, Any]:
    """Train, and measure it.

    Args:
        script: "sft", "dpo", ...
        words: Of its command line.

    Returns:
        `parameters` (trained), `steps`, `seconds` (of training, without evaluations), `memory` (peak, in bytes: of
        the device, or on a CPU what the process grew by; None where the system does not say), and `curves`
        (name -> [[step, value], ...]).
    """
    module = importlib.import_module(script)
    parsed = module.make_parser().parse_args_and_config(list(words))
    before = peak_memory()
    trainer = module.main(*parsed)
    after = peak_memory()
    history = trainer.state.log_history
    seconds = next(entry["train_runtime"] for entry in reversed(history) if "train_runtime" in entry)
    return {
        "parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "steps": trainer.state.global_step,
        "seconds": seconds - sum(entry.get("eval_runtime", 0.0) for entry in history),
        "memory": None if before is None or after is None else after - before,
        "curves": {name: [[e["step"], e[name]] for e in history if name in e] for name in CURVES},
    }


def peak_memory() -> int | None:
    """Bytes that were in use at once at most, so far; None where the system does not say."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Parser:
    """What `running.run` asks of a parser."""

    prog = "measured_run.py"

    def parse_args_and_config(self) -> tuple[str, str, list[str]]:
        """Script, file of the result, and the script's words."""
        script, result, *words = sys.argv[1:]
        return script, result, words


def main(script: str, result: str, words: list[str]) -> None:
    """Train, and write what was measured.

    Args:
        script: "sft", "dpo", ...
        result: File of the result.
        words: Of the script's command line.
    """
    write_text(Path(result), json.dumps(measure(script, words)))


if __name__ == "__main__":
    run(Parser, main)
