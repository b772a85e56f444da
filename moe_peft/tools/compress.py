"""Adapters in a fraction of their bytes, for upload: of what training changed, signs and one scale are kept (ComPEFT).

    t = w - w_start,   mask = the density n entries of largest |t|,   s = alpha std(t)
    w' = w_start + s sign(t) mask                    (Yadav et al., arXiv 2311.13171, section 2, tensor by tensor)

A tensor of n numbers takes n bits for the mask, a bit for the sign of each kept number, and its scale. Routers,
tensors that never train and what is saved beside the experts stay as they are. Most tensors start at zero or one.
Those that start at random are compressed where their start is given, or on request as if it had been zero, as the
paper's programs do.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..config.adapter_files import COMPRESSED, CONFIG, WEIGHTS, read_header
from ..files import check_free, new_folder
from ..messages import shown
from .adapter_tensors import Starts, expert_tensors
from .checks import is_real
from .export_merged import CARD, tokenizer_files
from .health import inspect_adapter
from .ternary import Ternary, packed, ternary, unpacked

FORM = "moe_peft_compressed"
VERSION = 1


@dataclass(frozen=True)
class Compressed:
    """What was written.

    Attributes:
        bytes_before: Size of the adapter's weights.
        bytes_after: Size of the compressed ones.
        errors: Key of a compressed tensor -> ||t - t'|| / ||t||, t what training changed and t' what is kept of it.
        whole: Keys of the tensors that are stored as they are.
    """

    bytes_before: int
    bytes_after: int
    errors: dict[str, float]
    whole: tuple[str, ...]

    def __str__(self) -> str:
        """One line."""
        share, least, most = self.bytes_after / self.bytes_before, min(self.errors.values()), max(self.errors.values())
        return (
            f"{self.bytes_before:,} -> {self.bytes_after:,} bytes ({share:.0%}); {len(self.errors)} tensors "
            f"compressed, of whose change {least:.3f} to {most:.3f} is lost (relative norm); {len(self.whole)} "
            "stored whole"
        )


def compress_adapter(
    folder: str | Path,
    output: str | Path,
    density: float = 0.2,
    *,
    alpha: float | None = 1.0,
    initial: str | Path | None = None,
    from_zero: bool = False,
) -> Compressed:
    """Write an adapter's change in signs, masks and scales; `decompress_adapter` makes an adapter of it again.

    Args:
        folder: Folder of a saved adapter, which is not changed.
        output: The folder to make; nothing loads it as an adapter before it is decompressed.
        density: Share of the numbers of a tensor that are kept, above 0 up to 1.
        alpha: Factor of the scale (the paper: 1 for large models, else chosen on held-out data); None takes the scale
            of least error, the mean of what is kept.
        initial: Folder to which the same adapter was saved before training, which decompressing needs too.
        from_zero: Whether tensors whose random start is not given are compressed as if it had been zero.

    Returns:
        Sizes and errors.

    Raises:
        ValueError: The adapter is broken or not of this package, a number is out of range, nothing in it has a start
            that is known, or there are files at `output`; nothing has been written.
    """
    folder = Path(folder)
    check_free(output)
    _check(density, alpha, from_zero)
    config = inspect_adapter(folder).config
    tensors, metadata = load_file(folder / WEIGHTS), dict(read_header(folder / WEIGHTS).metadata)
    starts = {} if initial is None else _initial(Path(initial), tensors)
    prefix = f"{config.adapter_type.lower()}_"
    experts = expert_tensors(read_header(folder / WEIGHTS), prefix)
    known = Starts(config)
    stored: dict[str, torch.Tensor] = {}
    form: dict[str, Any] = {}
    errors: dict[str, float] = {}
    for key, tensor in tensors.items():
        start = _start(key, experts, starts, config, known, from_zero) if key in experts else None
        found = None if start is None else _compressed(tensor, start, density, alpha)
        if start is None or found is None:
            stored[key] = tensor
            continue
        kept, errors[key] = found
        stored |= {f"{key}:{name}": part for name, part in packed(kept).items()}
        form[key] = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        form[key]["start"] = "initial" if key in starts else float(start.flatten()[0])
    if not form:
        raise ValueError(
            f"{folder}: no tensor has a known start from which training changed it. Give initial, the folder to which "
            "the adapter was saved before training, or from_zero=True where its experts are pairs of matrices."
        )
    used = {key: own for key, own in starts.items() if key in form}
    about = {"version": VERSION, "density": density, "alpha": alpha, "tensors": form, "initial": _digest(used)}
    with new_folder(output) as growing:
        _copy(folder, growing)
        save_file(stored, growing / COMPRESSED, metadata={**metadata, "format": "pt", FORM: json.dumps(about)})
        after = (growing / COMPRESSED).stat().st_size
    whole = tuple(key for key in tensors if key not in form)
    return Compressed((folder / WEIGHTS).stat().st_size, after, errors, whole)


def decompress_adapter(folder: str | Path, output: str | Path, *, initial: str | Path | None = None) -> None:
    """Make an adapter again of what `compress_adapter` has written.

    Args:
        folder: The compressed adapter's folder, which is not changed.
        output: The folder to make, which loads as any adapter.
        initial: The folder that compressing was given, if it was given one.

    Raises:
        ValueError: The folder holds no compressed adapter, or a damaged one, the start is another one, or there are
            files at `output`; nothing has been written.
    """
    folder = Path(folder)
    check_free(output)
    if not (folder / COMPRESSED).is_file() or not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} holds no {COMPRESSED} with {CONFIG}. Name a folder that moe-peft compress wrote.")
    metadata = dict(read_header(folder / COMPRESSED).metadata)
    about = _about(folder, metadata.pop(FORM, ""))
    stored = load_file(folder / COMPRESSED)
    starts: dict[str, torch.Tensor] = {}
    if about["initial"]:
        if initial is None:
            raise ValueError(
                f"{folder} holds changes from an adapter before training. Give its folder as initial (--initial)."
            )
        starts = load_file(Path(initial) / WEIGHTS) if (Path(initial) / WEIGHTS).is_file() else {}
        starts = {key: own for key, own in starts.items() if about["tensors"].get(key, {}).get("start") == "initial"}
        if _digest(starts) != about["initial"]:
            raise ValueError(
                f"{initial} is not the adapter from which {folder} holds changes. Name the folder that was given to "
                "compress."
            )
    tensors = _whole(folder, stored, about["tensors"], starts)
    with new_folder(output) as growing:
        _copy(folder, growing)
        save_file(tensors, growing / WEIGHTS, metadata=metadata)
        inspect_adapter(growing)


def _check(density: Any, alpha: Any, from_zero: Any) -> None:
    if not is_real(density, 0, 1) or density == 0:
        raise ValueError(f"density={shown(density)} must be a share above 0, up to 1, such as 0.2.")
    if alpha is not None and (not is_real(alpha, 0, 1e6) or alpha == 0):
        raise ValueError(f"alpha={shown(alpha)} must be a positive number, or None for the scale of least error.")
    if not isinstance(from_zero, bool):
        raise ValueError(f"from_zero={shown(from_zero)} must be True or False.")


def _initial(folder: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors before training, that are those of the adapter by their names and shapes."""
    inspect_adapter(folder)
    found = load_file(folder / WEIGHTS)
    if {key: own.shape for key, own in found.items()} != {key: own.shape for key, own in tensors.items()}:
        raise ValueError(f"initial={shown(str(folder))} holds another adapter: its tensors or their shapes differ.")
    return found


def _start(
    key: str,
    experts: Mapping[str, tuple[str, str]],
    starts: Mapping[str, torch.Tensor],
    config: Any,
    known: Starts,
    from_zero: bool,
) -> torch.Tensor | None:
    """What an expert's tensor was before training; None where that is not known."""
    if key in starts:
        return starts[key]
    place, name = experts[key]
    value = known.value(name)
    if value is not None and getattr(config, "init_weights", True) is not False:
        return torch.full((1,), value)
    if name in getattr(getattr(config, "kind", None), "frozen", ()):
        return None
    # Copies of the base model's experts have no tensor that starts at zero, and start nowhere near it.
    beside = any(known.carries_out(other) for at, other in experts.values() if at == place)
    return torch.zeros(1) if from_zero and beside else None


def _compressed(
    tensor: torch.Tensor, start: torch.Tensor, density: float, alpha: float | None
) -> tuple[Ternary, float] | None:
    change = tensor.double() - start.double()
    if not tensor.is_floating_point() or not bool(change.any()):
        return None
    kept = ternary(change, density, alpha)
    lost = change - kept.dense().double()
    return kept, float(lost.norm() / change.norm())


def _about(folder: Path, text: str) -> dict[str, Any]:
    """What the file says of its tensors."""
    try:
        about = json.loads(text)
        known = about["version"] == VERSION and isinstance(about["tensors"], dict) and "initial" in about
    except (ValueError, TypeError, KeyError, RecursionError):
        known = False
    if not known:
        raise ValueError(
            f"{folder / COMPRESSED} does not say what it holds in a form that this version of peft-moe knows "
            f"({shown(text)}). Download it again, or upgrade peft-moe."
        )
    return dict(about)


def _whole(
    folder: Path, stored: dict[str, torch.Tensor], form: Mapping[str, Any], starts: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    tensors = {key: own for key, own in stored.items() if key.rpartition(":")[0] not in form}
    for key, own in form.items():
        try:
            parts = {name: stored[f"{key}:{name}"] for name in ("mask", "sign", "scale")}
            shape, dtype = torch.Size(own["shape"]), getattr(torch, own["dtype"])
            change = unpacked(parts, shape).dense()
            start = starts[key] if own["start"] == "initial" else torch.tensor(float(own["start"]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{folder / COMPRESSED} is damaged at {shown(key)} ({shown(str(error))}). Download it again."
            ) from error
        tensors[key] = (start.double() + change.double()).to(dtype)
    return tensors


def _digest(starts: Mapping[str, torch.Tensor]) -> str | None:
    """Of the values from which changes count; None where there are none."""
    if not starts:
        return None
    total = hashlib.sha256()
    for key in sorted(starts):
        total.update(key.encode() + starts[key].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _copy(folder: Path, growing: Path) -> None:
    for path in [folder / CONFIG, folder / CARD, *tokenizer_files(folder)]:
        if path.is_file():
            shutil.copyfile(path, growing / path.name)
