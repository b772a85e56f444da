"""What merging an adapter would make of each parameter of its base model, one by one and without the model.

Layers say it of the modules that they wrap; beside them stand modules that were trained in full and embeddings of
single tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ..layers import RoutedLayer
from ..messages import shown
from ..tuner.merging import check_merges, plan_merges

Changes = dict[str, Callable[[torch.Tensor], torch.Tensor]]
IN_MEMORY = "Load base and adapter in memory, and call model.merge_and_unload().save_pretrained(folder)."


def weight_changes(model: PeftModel, adapter_name: str = "default") -> Changes:
    """Parameters that merging an adapter changes.

    Args:
        model: A model with the adapter, whose base weights may be on the meta device.
        adapter_name: Which adapter.

    Returns:
        Name of a parameter of the base model -> function that gives the merged tensor for the stored one.

    Raises:
        ValueError: The adapter depends on its input, or is around a module that cannot be merged into.
    """
    base = model.get_base_model()
    check_merges(base, plan_merges(base, [adapter_name], None, list(model.peft_config)), safe_merge=False)
    changes: Changes = {}
    for name, module in base.named_modules():
        if isinstance(module, RoutedLayer):
            if adapter_name in module.experts:
                own = module.weight_changes(adapter_name)
                changes |= {f"{name}.{key}": change for key, change in own.items()}
        elif isinstance(module, TrainableTokensLayer):
            if module.tied_adapter is None:
                ids, rows = module.token_indices[adapter_name], module.trainable_tokens_delta[adapter_name]
                changes[f"{name.removesuffix('.token_adapter')}.weight"] = partial(_with_rows, ids, rows)
        elif isinstance(module, ModulesToSaveWrapper):
            saved = module.modules_to_save[adapter_name]
            changes |= {f"{name}.{key}": partial(_replaced, own) for key, own in _plain(saved)}
        elif isinstance(module, BaseTunerLayer):
            raise ValueError(f"{name} has an adapter of peft's own beside {shown(adapter_name)}. {IN_MEMORY}")
    if not changes:
        raise ValueError(f"There is nothing to merge: no layer holds the adapter {shown(adapter_name)}.")
    _check_shared(base, changes)
    return changes


def _plain(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


@torch.no_grad()
def _with_rows(ids: list[int], rows: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    changed[ids] = rows.detach().to(tensor)
    return changed


def _replaced(saved: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    return saved.detach().to(tensor)


def _check_shared(base: Any, changes: Changes) -> None:
    """Refuse to change a weight that another module shares and would keep."""
    if not getattr(base.config, "tie_word_embeddings", False):
        return
    ends = [own for own in (base.get_input_embeddings(), base.get_output_embeddings()) if own is not None]
    for name, module in base.named_modules():
        alone = isinstance(module, ModulesToSaveWrapper) and any(own is module for own in ends)
        if alone and any(key.startswith(f"{name}.") for key in changes):
            raise ValueError(
                f"{name} was trained in full, and the base model ties it to another module, which its merged weight "
                "would change too. Load the base model with tie_word_embeddings=False, put the adapter on it, and "
                "call model.merge_and_unload().save_pretrained(folder)."
            )
