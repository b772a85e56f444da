"""LoRA adapters of stock peft as pairs by place: y = W0 x + s B A x, each with its own rank and scale."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils import load_peft_weights
from peft.utils.other import get_pattern_key

from ..config.adapter_files import is_finite
from ..config.ranges import LARGEST
from ..messages import shown
from .checks import is_real

KEY = re.compile(r"(?:base_model\.model\.)?(?P<place>.+)\.lora_(?P<factor>[AB])\.weight")
# Fields of a LoRA that make it more than pairs beside linear layers, with what has to stand there.
PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "layer_replication": (None,),
    "use_qalora": (False,),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
}
# Ways to start that leave the base weights as they are; the others take a part of them into the pairs.
STARTS = (True, False, "gaussian", "eva", "orthogonal")
START = "init_lora_weights"


@dataclass(frozen=True)
class Pair:
    """One place of a LoRA.

    Attributes:
        A: (r, D).
        B: (O, r), with the scale in it.
    """

    A: torch.Tensor
    B: torch.Tensor

    @property
    def rank(self) -> int:
        """The rank."""
        return len(self.A)


@dataclass(frozen=True)
class StockLora:
    """A LoRA as pairs.

    Attributes:
        name: Where it comes from.
        config: Its configuration.
        pairs: Full name of a linear layer -> its pair.
    """

    name: str
    config: LoraConfig
    pairs: Mapping[str, Pair]

    @property
    def rank(self) -> int:
        """The largest rank of its places."""
        return max(pair.rank for pair in self.pairs.values())


def read_lora(name: str) -> StockLora:
    """Read a LoRA of stock peft.

    Args:
        name: Its folder, or its name on the Hub.

    Raises:
        ValueError: It is no LoRA, or more than pairs beside linear layers; the field or tensor is named.
    """
    try:
        config = PeftConfig.from_pretrained(str(name))
    except (KeyError, TypeError, OSError, ValueError) as error:
        raise ValueError(f"{shown(name)} holds no adapter of peft ({' '.join(str(error).split())}).") from error
    if not isinstance(config, LoraConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(f"{shown(name)} holds an adapter of the type {shown(kind)}, and a stock LoRA is needed.")
    for field, allowed in PLAIN.items():
        value = getattr(config, field, allowed[0])
        if value not in allowed:
            raise ValueError(
                f"The LoRA in {shown(name)} has {field}={shown(value)}, which no routed sum of pairs equals. Train it "
                f"with {field}={shown(allowed[0])}, or keep it as an adapter of its own."
            )
    if getattr(config, START) not in STARTS:
        raise ValueError(
            f"The LoRA in {shown(name)} has {START}={shown(getattr(config, START))}, so that its base weights are "
            "others than the model's. Save it again as a plain one (path_initial_model_for_weight_conversion)."
        )
    return StockLora(str(name), config, _pairs(str(name), config, load_peft_weights(str(name), device="cpu")))


def _pairs(name: str, config: LoraConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, Pair]:
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None or tensor.dim() != 2:
            raise ValueError(
                f"The LoRA in {shown(name)} holds {shown(key)} of shape {tuple(tensor.shape)}, which is no pair of a "
                "linear layer. Leave embeddings and convolutions out of target_modules."
            )
        factors.setdefault(match["place"], {})[match["factor"]] = tensor
    broken = next((place for place, own in factors.items() if not _is_pair(own)), None)
    if broken is not None or not factors:
        raise ValueError(f"The LoRA in {shown(name)} has no whole pair at {shown(broken or 'any place')}.")
    wrong = [key for key, tensor in tensors.items() if not is_finite(tensor)]
    if wrong:
        raise ValueError(
            f"The LoRA in {shown(name)} holds NaN or infinite values in {len(wrong)} tensors: {shown(wrong)}. Take it "
            "from an earlier checkpoint."
        )
    return {place: _pair(place, own, config) for place, own in factors.items()}


def _is_pair(own: Mapping[str, torch.Tensor]) -> bool:
    """Whether there are both factors, of one rank."""
    return set(own) == {"A", "B"} and 0 < len(own["A"]) == own["B"].shape[1]


def _pair(place: str, own: Mapping[str, torch.Tensor], config: LoraConfig) -> Pair:
    patterns = config.alpha_pattern or {}
    alpha, r = patterns.get(get_pattern_key(list(patterns), place), config.lora_alpha), len(own["A"])
    if not is_real(alpha, -LARGEST, LARGEST):
        raise ValueError(f"The LoRA has lora_alpha={shown(alpha)} at {shown(place)}, where a finite number belongs.")
    scaling = alpha / (math.sqrt(r) if config.use_rslora else r)
    dtype = torch.promote_types(own["A"].dtype, torch.float32)
    return Pair(own["A"].to(dtype), scaling * own["B"].to(dtype))
