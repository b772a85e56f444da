"""Where a run resumes: the last checkpoint that was written whole, as a killed process leaves the one it was writing.

The trainer writes weights, optimizer, random states and, last, trainer_state.json, none of them atomically. Given a
half-written folder it stops with a decoding error, or goes on with a fresh optimizer; so these scripts look first.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

STATE = "trainer_state.json"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
PICKLES = (".pt", ".pth", ".bin")
# What resuming needs, and the forms it takes with one process, DDP, FSDP and DeepSpeed.
PARTS = {
    "weights": (
        "adapter_model.safetensors",
        "model*.safetensors",
        "*/adapter_model.safetensors",
        "pytorch_model_fsdp*",
        "global_step*",
    ),
    "optimizer": ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*"),
    "learning rate": ("scheduler.pt", "global_step*"),
    "random states": ("rng_state*.pth",),
}


def resume_point(training_args: Any) -> str | None:
    """Resolve `--resume_from_checkpoint`, before any model is loaded.

    Args:
        training_args: The trainer's arguments; true means the last complete checkpoint in `output_dir`.

    Returns:
        The checkpoint's folder; None where the run starts at step 0.

    Raises:
        ValueError: There is no complete checkpoint, or the one that was named is not complete.
    """
    wanted = str(training_args.resume_from_checkpoint or "false")
    if wanted.lower() in ("false", "no", "none"):
        return None
    by_name = wanted.lower() not in ("true", "yes")
    folder = Path(wanted) if by_name else Path(training_args.output_dir)
    if by_name and folder.is_file():
        raise ValueError(
            f"--resume_from_checkpoint {folder} is a file. Name the folder of a checkpoint, or write true."
        )
    # The output folder of a run stands for its last complete checkpoint.
    by_name = by_name and not (_numbered(folder) is None and any(folder.glob("checkpoint-*")))
    if by_name:
        reason = why_incomplete(folder)
        if reason:
            raise ValueError(
                f"--resume_from_checkpoint {folder}: {reason}. Name a complete one, or write true for the last "
                "complete checkpoint in output_dir."
            )
        _say_where_it_ends(folder, training_args)
        return str(folder)
    found, skipped = last_complete(folder)
    if skipped and training_args.local_process_index == 0:
        for name, reason in skipped.items():
            print(f"Not resuming from {name}, which was not written whole: {reason}.", flush=True)
    if found is None:
        raise ValueError(
            f"--resume_from_checkpoint {wanted}, but {folder} has no complete checkpoint. Leave the flag out to "
            "start at step 0, or check output_dir."
        )
    if training_args.local_process_index == 0:
        print(f"Resuming from {found}.", flush=True)
    _say_where_it_ends(found, training_args)
    return str(found)


def _say_where_it_ends(checkpoint: Path, training_args: Any) -> None:
    """Say so where a checkpoint is the end of the run, so that nothing is left to train."""
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    step, epoch = state["global_step"], state.get("epoch") or 0
    by_steps = training_args.max_steps > 0
    if step < training_args.max_steps if by_steps else epoch < training_args.num_train_epochs:
        return
    if training_args.local_process_index == 0:
        limit = (
            f"--max_steps {training_args.max_steps}"
            if by_steps
            else f"--num_train_epochs {training_args.num_train_epochs:g}"
        )
        print(
            f"{checkpoint} is the end of the run: with {limit} nothing is left to train. Raise it to go on.",
            flush=True,
        )


def last_complete(folder: Path) -> tuple[Path | None, dict[str, str]]:
    """Find the complete checkpoint with the highest step.

    Args:
        folder: An output folder; it need not exist.

    Returns:
        The checkpoint or None, and the later ones that were skipped: name -> reason.
    """
    numbered = [(int(match.group(1)), path) for path in folder.glob("checkpoint-*") if (match := _numbered(path))]
    skipped = {}
    for _, path in sorted(numbered, reverse=True):
        reason = why_incomplete(path)
        if reason is None:
            return path, skipped
        skipped[path.name] = reason
    return None, skipped


def why_incomplete(checkpoint: Path) -> str | None:
    """Say what a checkpoint lacks.

    Args:
        checkpoint: Its folder.

    Returns:
        A reason, or None when everything is there and readable.
    """
    if not checkpoint.is_dir():
        return "there is no such folder"
    try:
        step = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"it has no readable {STATE}, which is written last"
    number = _numbered(checkpoint)
    if number and int(number.group(1)) != step:
        return f"its {STATE} is of step {step}"
    for part, patterns in PARTS.items():
        if not any(next(checkpoint.glob(pattern), None) for pattern in patterns):
            return f"it has no {part} ({patterns[0]})"
    broken = next((path for path in sorted(checkpoint.rglob("*")) if path.is_file() and not _readable(path)), None)
    return f"{broken.relative_to(checkpoint)} is truncated" if broken else None


def _numbered(path: Path) -> re.Match[str] | None:
    return CHECKPOINT.fullmatch(path.name)


def _readable(path: Path) -> bool:
    """Whether a file has its end: safetensors know their length, and torch's zip files end with a directory."""
    if path.suffix in PICKLES:
        return zipfile.is_zipfile(path)
    if path.suffix != ".safetensors":
        return True
    try:
        with safe_open(path, framework="pt"):
            return True
    except SafetensorError:
        return False
