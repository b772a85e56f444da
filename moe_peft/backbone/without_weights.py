"""A model as it would be loaded, without memory for its weights: its modules on the meta device."""

from __future__ import annotations

from typing import Any

import torch
import transformers


def meta_model(model_config: Any, task_type: str | None = "CAUSAL_LM", trust_remote_code: bool = False) -> Any:
    """Build the model that `from_pretrained` would load, on the meta device.

    Args:
        model_config: Configuration of the base model.
        task_type: "SEQ_CLS" gives it a head with one output, a reward; otherwise the class is the checkpoint's own.
        trust_remote_code: Whether code of the checkpoint may run.
    """
    with torch.device("meta"):
        if task_type == "SEQ_CLS":
            model_config.num_labels = 1
            auto_class = transformers.AutoModelForSequenceClassification
            return auto_class.from_config(model_config, trust_remote_code=trust_remote_code)
        own_class = getattr(transformers, (model_config.architectures or [""])[0], None)
        if own_class is not None:
            return own_class(model_config)
        return transformers.AutoModelForCausalLM.from_config(model_config, trust_remote_code=trust_remote_code)
