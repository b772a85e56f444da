"""What an adapter trains beside its layers, as stock adapters do: modules in full, and embeddings of tokens."""

from __future__ import annotations

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict

from ..layers import routed_layers


def further_tensors(model: PeftModel, adapter_name: str) -> dict[str, torch.Tensor]:
    """Copies of the tensors that stand beside an adapter's own, under the names that stock peft has for them.

    Args:
        model: A model with the adapter.
        adapter_name: Which adapter.
    """
    prefixes = {f".{layer.prefix}" for layer in routed_layers(model) if adapter_name in layer.experts}
    saved = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    return {
        key: tensor.detach().cpu().clone().contiguous()
        for key, tensor in saved.items()
        if not any(prefix in key for prefix in prefixes)
    }
