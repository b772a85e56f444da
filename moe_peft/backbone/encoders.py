"""Tells the language model of a multi-modal model from its encoders of images and sound, projectors included.

The rows of an encoder's layers are patches or frames: they have neither the attention mask nor the samples of the
text, and their number may equal the text's by chance, so that no shape can tell them apart.
"""

from __future__ import annotations

import re
from typing import Any, cast

from torch import nn

# A model beside others: what transformers calls the one that reads text.
LANGUAGE_MODELS = ("language_model", "text_model")
# Where nothing is called so, an encoder stands among the layers of the language model, by one of these names.
ENCODERS = ("vision_tower", "visual", "vision_model", "image_encoder", "audio_tower", "audio_encoder")


def encoder_names(model: nn.Module) -> set[str]:
    """Names of the parts that read images or sound.

    They are what stands beside the module `language_model`. In a model that predicts tokens `text_model` is another
    name for it, and an encoder may also be recognized by its own name; elsewhere (CLIP) text and images are equals.

    Args:
        model: Any model, with or without adapters.

    Returns:
        Full module names; what lies below them belongs to the part. Empty for a model of text alone.
    """
    head = cast(Any, model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    readers = LANGUAGE_MODELS if head is not None else LANGUAGE_MODELS[:1]
    names: set[str] = set()
    for prefix, module in model.named_modules():
        children = dict(module.named_children())
        if any(reader in children for reader in readers):
            parts = [name for name, child in children.items() if name not in readers and child is not head]
        else:
            parts = [name for name in children if head is not None and name in ENCODERS]
        names.update(f"{prefix}.{part}".lstrip(".") for part in parts)
    return names


def encoder_pattern(names: set[str]) -> str:
    """A regular expression that matches every module of the encoders, as `exclude_modules` takes it.

    Args:
        names: Full names of the encoders.
    """
    outermost = sorted(name for name in names if not any(name.startswith(f"{other}.") for other in names))
    return rf"({'|'.join(re.escape(name) for name in outermost)})(\..*)?"
