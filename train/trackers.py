"""Whether what a run reports to is installed, said before a model is loaded."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from moe_peft.messages import shown


def check_trackers(names: Sequence[str]) -> None:
    """Make the callback of each tracker once, as the trainer does after the model is loaded.

    Args:
        names: The trainer's `report_to`, as `TrainingArguments` keeps it.

    Raises:
        ValueError: A name is none of a tracker, or the tracker's package is not installed.
    """
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            near = difflib.get_close_matches(str(name), INTEGRATION_TO_CALLBACK, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"It takes {', '.join(INTEGRATION_TO_CALLBACK)}, or none."
            raise ValueError(f"--report_to {shown(name)} is no tracker. {hint}")
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (ImportError, RuntimeError) as error:
            raise ValueError(f"--report_to {name}: {error} Install it, or write --report_to none.") from error
