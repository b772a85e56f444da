"""A learning rate where none was given: that of the method, for the kind of training.

TRL's own defaults (2e-5 in supervised fine-tuning, 1e-6 in DPO) are those of full fine-tuning, and train an adapter
next to nothing.
"""

from __future__ import annotations

from typing import Any

from baselines import Baseline

from moe_peft.config.config import MoeConfig
from moe_peft.config.fields import MixtureConfig
from moe_peft.methods.scale import pace_alpha

# Rate of a kind of training over that of supervised fine-tuning. Preferences and rewards are pursued more carefully,
# as their losses can be lowered without end.
FACTORS = {"sft": 1.0, "reward": 0.5, "dpo": 0.1, "kto": 0.1, "grpo": 0.1, "rloo": 0.1}


def choose_rate(training_args: Any, moe_args: Any, config: MoeConfig | Baseline, script: str) -> str:
    """Set the learning rate where neither a flag nor a file gave one.

    Args:
        training_args: The trainer's arguments, which are changed.
        moe_args: The adapter's flags, with the names of all that were given in `given`; without it nothing changes.
        config: The adapter's configuration.
        script: "sft", "dpo", ...

    Returns:
        A line for the dry run.
    """
    given = getattr(moe_args, "given", None)
    if given is None or "learning_rate" in given:
        return f"learning rate: {training_args.learning_rate:g}{scale_of(config)}"
    training_args.learning_rate = default_rate(config, script)
    rate = f"learning rate: {training_args.learning_rate:g}, the default of {config.method} for {script}"
    return rate + scale_of(config)


def scale_of(config: MoeConfig | Baseline) -> str:
    """What to say of a mixture's scale beside the rate: how far it is from that which learns at LoRA's pace.

    Args:
        config: The adapter's configuration.

    Returns:
        A further line; nothing where the scale is that one, or where there is none.
    """
    if not isinstance(config, MixtureConfig) or "scaling" not in config.kind.fields:
        return ""
    alpha = pace_alpha(config)
    factor = config.lora_alpha / alpha
    if 0.8 <= factor <= 1.25:
        return ""
    return (
        f"\nlora_alpha: {config.lora_alpha:g}, {factor:.2g} of the {alpha:g} at which this mixture learns at the pace "
        "of LoRA with lora_alpha = 2 r (--moe_lora_alpha)"
    )


def default_rate(config: MoeConfig | Baseline, script: str) -> float:
    """Rate of a method in a kind of training, where nobody says one.

    Args:
        config: The adapter's configuration.
        script: "sft", "dpo", ...
    """
    return float(f"{config.default_learning_rate * FACTORS[script]:.3g}")
