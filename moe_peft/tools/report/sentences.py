"""The experts of each token of some sentences, to be shown in context."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...selection.scoring import evaluating
from ...types import Routing
from .measure import Key, PlaceRouting, valid_gates
from .observe import Batch, base_model, needs_decoder_input, observing, run

TOKENS = 96  # of a sentence
PLACES = 3


@dataclass(frozen=True)
class Sentence:
    """A text, token by token.

    Attributes:
        group: Its group.
        tokens: The tokens as they are written, with the space before them.
        weights: (place, adapter) -> (T, E) combine weight of every expert.
    """

    group: str
    tokens: list[str]
    weights: dict[Key, torch.Tensor]


def shown_places(places: Sequence[PlaceRouting], count: int = PLACES) -> list[Key]:
    """Places to show tokens at: of the first, a middle and the last layer, one each.

    Args:
        places: All.
        count: At most so many.

    Returns:
        Those that tell tokens apart, where there are any.
    """
    apart = [own for own in places if own.decides != "nobody"] or list(places)
    of_layers: dict[Any, PlaceRouting] = {}
    for own in apart:
        of_layers.setdefault(own.place if own.layer is None else own.layer, own)
    firsts = list(of_layers.values())
    wanted = min(count, len(firsts))
    steps = [round(number * (len(firsts) - 1) / max(wanted - 1, 1)) for number in range(wanted)]
    return [(firsts[step].place, firsts[step].adapter) for step in steps]


def read_sentences(
    model: nn.Module,
    tokenizer: Any,
    batches: Mapping[str, Sequence[Batch]],
    wanted: Iterable[Key],
    *,
    per_group: int = 2,
) -> list[Sentence]:
    """Run the first samples of each group one by one.

    Args:
        model: The model; it is left as it was.
        tokenizer: Of the model.
        batches: Name of a group -> batches.
        wanted: Places and adapters to read.
        per_group: Samples of each group.

    Returns:
        Sentences in the groups' order; those without a token, and batches without token ids, are left out.
    """
    encoder = _encoder_modules(model)
    keys = [key for key in wanted if encoder is None or key[0] in encoder]
    found: list[Sentence] = []
    with evaluating(model):
        for group, own in batches.items():
            for row in _rows(own, per_group):
                sentence = _read(model, tokenizer, group, row, keys)
                found += [] if sentence is None else [sentence]
    return found


def _rows(batches: Sequence[Batch], count: int) -> list[dict[str, Any]]:
    """The first rows of the first batch, as batches of one."""
    if not batches or not isinstance(batches[0].get("input_ids"), torch.Tensor):
        return []
    size = len(batches[0]["input_ids"])
    return [
        {
            name: value[number : number + 1]
            for name, value in batches[0].items()
            if isinstance(value, torch.Tensor) and value.dim() and len(value) == size
        }
        for number in range(min(size, count))
    ]


def _read(model: nn.Module, tokenizer: Any, group: str, row: dict[str, Any], keys: list[Key]) -> Sentence | None:
    ids_T = row["input_ids"].reshape(-1)
    if row.get("attention_mask") is not None:
        ids_T = ids_T[row["attention_mask"].reshape(-1).to(ids_T.device) != 0]
    made: dict[Key, torch.Tensor] = {}

    def observe(place: str, adapter: str, routing: Routing) -> None:
        gates_TE = valid_gates(routing)
        if (place, adapter) in keys and len(ids_T) and len(gates_TE) % len(ids_T) == 0:
            by_head = gates_TE.view(len(ids_T), -1, gates_TE.shape[1])  # some adapters decide for each head
            made.setdefault((place, adapter), by_head.mean(1)[:TOKENS])

    with observing(model, observe):
        run(model, row)
    if not made:
        return None
    weights = {key: made[key] for key in keys if key in made}
    return Sentence(group, written(tokenizer, ids_T[:TOKENS].tolist()), weights)


def _encoder_modules(model: nn.Module) -> set[str] | None:
    """Names of the modules that read the tokens of the input, where a decoder reads others."""
    if not needs_decoder_input(model):
        return None
    base: Any = base_model(model)
    encoder = base.get_encoder()
    prefix = next(name for name, module in base.named_modules() if module is encoder)
    return {f"{prefix}.{name}" for name, _ in encoder.named_modules()}


def written(tokenizer: Any, ids: list[int]) -> list[str]:
    """Tokens as they are written in a text, each with the space before it.

    Args:
        tokenizer: Any.
        ids: Token ids.
    """
    pieces = tokenizer.convert_ids_to_tokens(ids)
    words = []
    for number, piece in zip(ids, pieces, strict=True):
        if piece is None:
            words.append(f"[{number}]")
            continue
        space = " " if piece[:1] in ("\u0120", "\u2581") else ""
        text = tokenizer.decode([number], skip_special_tokens=False)
        words.append(space + (text.strip() or piece.lstrip("\u0120\u2581").replace("\u010a", "\\n") or space))
    if not any(word.startswith(" ") for word in words):
        # Whole words: their tokenizer drops what stands between them.
        words = [word[2:] if word.startswith("##") else f" {word}" for word in words]
    return words
