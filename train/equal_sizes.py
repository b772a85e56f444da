"""Equal numbers of trained parameters: which rank, or number of experts, gives a method the size of another.

Both numbers of a method's size are affine in a rank, so that two counts on the model without weights give it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from baselines import describe
from common import moe_config
from flags import PREFIX

# Fields that a size may be chosen by, in this order.
SIZES = ("r", "num_experts")


@dataclass(frozen=True)
class Size:
    """The size of a method in a comparison.

    Attributes:
        parameters: Trained parameters.
        wanted: How many they were to be; None where nothing was asked.
        changed: Flag -> value, of what was changed for it.
    """

    parameters: int
    wanted: int | None = None
    changed: dict[str, Any] = field(default_factory=dict)

    @property
    def words(self) -> list[str]:
        """What was changed, as words of a command line."""
        return [word for name, value in self.changed.items() for word in (f"--{name}", f"{value:g}")]

    def __str__(self) -> str:
        """In one line."""
        text = f"{self.parameters:,} trained parameters"
        if self.changed:
            text += f" with {', '.join(f'{name} {value:g}' for name, value in self.changed.items())}"
        if self.wanted is None or self.parameters == self.wanted:
            return text
        share = 100 * (self.parameters / self.wanted - 1)
        return f"{text}, {share:+.1f}% of {self.wanted:,}, the nearest"


def equal_size(model: Any, moe_args: Any, task_type: str, wanted: int | None) -> Size:
    """Find the size of a method that is nearest to a number of parameters.

    Args:
        model: The model on the meta device.
        moe_args: The method's flags.
        task_type: peft's task type.
        wanted: How many parameters; None leaves the method as it is.

    Raises:
        ValueError: Flags do not fit each other or the model.
    """

    def count(changed: dict[str, Any]) -> int:
        return describe(model, moe_config(changed_flags(moe_args, changed), task_type)).num_parameters

    own = Size(count({}), wanted)
    if wanted is None or own.parameters == wanted:
        return own
    config = moe_config(moe_args, task_type)
    for name in SIZES:
        value = getattr(config, name, None)
        if not isinstance(value, int) or getattr(config, "per_layer", None) is not None:
            continue
        slope = count({PREFIX + name: value + 1}) - own.parameters
        if slope <= 0:
            continue
        near = value + (wanted - own.parameters) / slope
        least = max(1, getattr(config, "top_k", None) or 1) if name == "num_experts" else 1
        tries = {max(least, number) for number in (math.floor(near), math.ceil(near))}
        sizes = [Size(count(own), wanted, own) for own in (_with_scale(moe_args, config, name, n) for n in tries)]
        return min(sizes, key=lambda size: abs(size.parameters - wanted))
    return own


def changed_flags(moe_args: Any, changed: dict[str, Any]) -> Any:
    """Flags with other values.

    Args:
        moe_args: The method's flags.
        changed: Flag -> value.
    """
    return dataclasses.replace(moe_args, **changed)


def _with_scale(moe_args: Any, config: Any, name: str, value: int) -> dict[str, Any]:
    """A size, and with another rank the `lora_alpha` that keeps the scale where one was given."""
    changed: dict[str, Any] = {PREFIX + name: value}
    alpha = getattr(moe_args, f"{PREFIX}lora_alpha", None)
    if name == "r" and alpha is not None:
        share = value / config.r
        changed[f"{PREFIX}lora_alpha"] = float(f"{alpha * (math.sqrt(share) if config.use_rslora else share):.6g}")
    return changed
