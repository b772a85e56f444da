"""The tables of docs/backbones.md, made from the tiny models; run as a module it writes them into the page."""

from __future__ import annotations

import re
from pathlib import Path

from moe_peft.backbone.expert_tensors import expert_tensors
from moe_peft.backbone.structure import find_moe_layers, opaque_blocks
from tests.backbones.models import TYPES, known, tiny_model
from tests.backbones.multimodal_cases import base_model, sparse_blocks
from tests.backbones.multimodal_models import MULTIMODAL, language_model_type

PAGE = Path(__file__).parents[2] / "docs/backbones.md"
HEADS = ("model type", "PERFT-R, D, S around", "PERFT-E, low-rank ESFT", "ESFT with whole matrices", "experts run as")

MULTIMODAL_HEADS = ("multi-modal type", "language model", HEADS[1], "PERFT-E", "ESFT, scores of experts")


def supported_row(model_type: str) -> tuple[str, ...] | None:
    """What works on a type by the structure of its model; None where no adapter follows its experts."""
    model = tiny_model(model_type)
    layers = find_moe_layers(model)
    if not layers:
        return None
    first = layers[0]
    block = "its experts" if first.block is None else f"`{first.block.rpartition('.')[2]}`"
    sliced = expert_tensors(model.get_submodule(first.experts), first.num_experts)
    run = "eager, batched_mm, grouped_mm" if model._can_set_experts_implementation() else "their own loop"
    return f"`{model_type}`", block, "yes", "yes" if sliced else "no: no slice per expert", run


def refused_row(model_type: str) -> tuple[str, ...]:
    """Where an adapter with a router of its own goes, and why none follows the experts."""
    blocks = opaque_blocks(tiny_model(model_type))
    name, reason = next(iter(blocks.items()))
    reason = reason.replace(f"{name}.experts", "its module `experts`").replace(name, "its block")
    return f"`{model_type}`", f"`{name.rpartition('.')[2]}`", reason


def multimodal_row(model_type: str) -> tuple[str, ...]:
    """What works on a multi-modal type by the structure of its model."""
    model = base_model(model_type)
    layers, blocks = find_moe_layers(model), sparse_blocks(model)
    indices = [layer.index for layer in layers]
    followed = "yes" if layers else "no, as on its language model"
    selected = "no: two experts modules in a layer" if len(set(indices)) < len(indices) else followed
    wrapped = " and ".join(f"`{name}`" for name in dict.fromkeys(block.rpartition(".")[2] for block in blocks))
    if blocks == [layer.experts for layer in layers]:
        wrapped = "its experts"
    return f"`{model_type}`", f"`{language_model_type(model_type)}`", wrapped, followed, selected


def markdown(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables() -> tuple[str, str, str]:
    """The supported types, the refused ones and the multi-modal ones, of those that the installed transformers has."""
    types = [model_type for model_type in TYPES if known(model_type)]
    rows = {model_type: supported_row(model_type) for model_type in types}
    supported = [row for row in rows.values() if row is not None]
    refused = [refused_row(model_type) for model_type, row in rows.items() if row is None]
    multimodal = [multimodal_row(model_type) for model_type in MULTIMODAL if known(model_type)]
    return (
        markdown(HEADS, supported),
        markdown(("model type", HEADS[1], "why no adapter follows its experts"), refused),
        markdown(MULTIMODAL_HEADS, multimodal),
    )


if __name__ == "__main__":
    text = PAGE.read_text()
    for table in tables():
        heads = re.escape(table.splitlines()[0])
        text = re.sub(rf"^{heads}\n(\|.*\n)*", lambda match, table=table: f"{table}\n", text, flags=re.MULTILINE)
    PAGE.write_text(text)
