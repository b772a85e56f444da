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

from running import run

from moe_peft.files import write_text
from moe_peft.tools.peak_memory import rise_of_memory

# Curves that a comparison reads from the trainer's log, where they are there.
CURVES = ("loss", "eval_loss", "reward", "eval_reward")


def measure(script: str, words: Sequence[str]) -> dict[str, Any]:
    """Train, and measure it.

    Args:
        script: "sft", "dpo", ...
        words: Of its command line.

    Returns:
        `parameters` (trained), `steps`, `seconds` (of training, without evaluations), `memory` (bytes, see
        `rise_of_memory`), and `curves` (name -> [[step, value], ...]).
    """
    module = importlib.import_module(script)
    parsed = module.make_parser().parse_args_and_config(list(words))
    trainer, memory = rise_of_memory(lambda: module.main(*parsed))
    history = trainer.state.log_history
    seconds = next(entry["train_runtime"] for entry in reversed(history) if "train_runtime" in entry)
    return {
        "parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "steps": trainer.state.global_step,
        "seconds": seconds - sum(entry.get("eval_runtime", 0.0) for entry in history),
        "memory": memory,
        "curves": {name: [[e["step"], e[name]] for e in history if name in e] for name in CURVES},
    }


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
