"""What an adapter trains beside its layers, as stock adapters do: modules in full, and embeddings of tokens."""

from __future__ import annotations

import torch
from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import get_peft_model_state_dict
from peft.utils.other import ModulesToSaveWrapper

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


@torch.no_grad()
def copy_further(model: PeftModel, adapter_name: str, new_name: str) -> None:
    """Give an adapter the values of another one's modules and tokens beside the layers.

    Args:
        model: A model with both adapters.
        adapter_name: Whose values.
        new_name: The adapter that gets them.
    """
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and {adapter_name, new_name} <= set(module.modules_to_save):
            module.modules_to_save[new_name].load_state_dict(module.modules_to_save[adapter_name].state_dict())
        elif isinstance(module, TrainableTokensLayer) and module.tied_adapter is None:
            own = module.trainable_tokens_delta
            if {adapter_name, new_name} <= set(own):
                own[new_name].copy_(own[adapter_name])
