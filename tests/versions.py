"""Which calls of the installed transformers the installed peft is too old for."""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version
from transformers.integrations import peft as integration

# Its own calls on a model; load_adapter, PeftModel and get_peft_model go without.
REFUSED = ("add_adapter", "set_adapter", "active_adapters", "enable_adapters", "disable_adapters")
REFUSED += ("delete_adapter", "get_adapter_state_dict")
NOT_COMPATIBLE = "The version of PEFT you are using is not compatible"
_least = getattr(integration, "MIN_PEFT_VERSION", "0")
# Why the calls are refused; None where they are not.
TRANSFORMERS_ASKS_FOR_MORE = (
    f"{version('transformers')} asks for peft {_least} in {', '.join(REFUSED)}; this is {version('peft')}"
    if Version(version("peft")) < Version(_least)
    else None
)
