"""`moe-peft describe`: what an adapter would train, and the memory that takes, from a model's configuration alone."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch

from ..backbone.without_weights import meta_model
from ..describe import Description
from ..tables import table
from ..tools.memory import size_text, training_memory
from .errors import not_found
from .shipped import shipped

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass
class DescribeArguments:
    """The model and the batch."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Name of the model on the Hub, or its folder; --model is the same."}
    )
    model_revision: str = field(default="main", metadata={"help": "Version of the model on the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether code of the checkpoint may run."})
    dtype: str = field(default="bfloat16", metadata={"help": "Of the weights.", "choices": [*DTYPES, "auto"]})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Rows of a batch; default: 1."})
    max_length: int = field(default=2048, metadata={"help": "Tokens of a row; default: 2048."})
    all_places: bool = field(default=False, metadata={"help": "One line for every place, not for every kind."})


def run(argv: list[str]) -> int:
    """Print the dry run and the memory of a training step.

    Args:
        argv: The words after the verb.

    Raises:
        ValueError: Flags do not fit each other or the model.
    """
    sys.path.insert(0, str(shipped("train")))
    try:
        from arguments import ScriptParser
        from baselines import adapter_of, describe
        from common import MoeArguments, moe_config
        from dry_run import check_model_name
        from transformers import AutoConfig

        parser = ScriptParser((DescribeArguments, MoeArguments), prog="moe-peft describe", ignores_unknown_keys=True)
        words = ["--model_name_or_path" if word == "--model" else word for word in argv]
        given, moe = parser.parse_args_and_config(words)
        for name in ("per_device_train_batch_size", "max_length"):
            if getattr(given, name) < 1:
                raise ValueError(f"--{name} {getattr(given, name)} must be at least 1.")
        check_model_name(given.model_name_or_path)
        config = moe_config(moe)
        if adapter_of(config) is None:
            raise ValueError(f"--moe_method {moe.moe_method} has no adapter to describe: it trains every weight.")
    finally:
        sys.path.remove(str(shipped("train")))
    origin = {"revision": given.model_revision, "trust_remote_code": given.trust_remote_code}
    try:
        model_config = AutoConfig.from_pretrained(given.model_name_or_path, **origin)
    except OSError as error:
        raise ValueError(not_found("--model", given.model_name_or_path, error)) from error
    base = meta_model(model_config, trust_remote_code=given.trust_remote_code)
    found = describe(base, config)
    print(str(found) if given.all_places else by_kind(found))
    rate = f"{config.default_learning_rate:g}"
    print(f"learning rate where none is given: {rate} in sft\n")
    memory = training_memory(
        base,
        adapter_of(config),
        batch_size=given.per_device_train_batch_size,
        length=given.max_length,
        dtype=DTYPES.get(given.dtype),
    )
    print(memory)
    if memory.activations is None:
        print("This adapter's activations depend on the data, so that they are not known without a run.")
    print(f"\nsaved adapter: about {size_text(memory.file)}. An estimate of one process, without fragmentation.")
    return 0


def by_kind(found: Description) -> str:
    """The dry run with one line for the same place of all layers.

    Args:
        found: Of a configuration.
    """
    groups: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for place, count in zip(found.places, found.parameters, strict=True):
        name = re.sub(r"\.\d+(?=\.|$)", ".*", place.name)
        groups[name, place.kind, f"{place.in_features} -> {place.out_features}"].append(count)
    rows: list[Any] = [("place", "layer", "in -> out", "times", "trainable")]
    for (name, kind, widths), counts in groups.items():
        rows.append((name, kind, widths, str(len(counts)), f"{sum(counts):,}"))
    rest = str(found).splitlines()[1 + len(found.places) :]
    return "\n".join([table(rows), *rest])
