"""How adapters are merged into a wrapped module's weights: all of them or none, and the last one out first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge

from ..config.parts import parts_merge
from ..messages import shown, warn
from .adapter_layer import AdapterLayer


class MergingLayer(AdapterLayer):
    """Holds adapters that may become a part of the base weights.

    A kind of layer that `merges` has `merge_one` and `unmerge_to`, and refuses in `check_merge` what it cannot store.

    Attributes:
        merges: Whether parts that do the same for every input can be merged at this kind of place.
    """

    merges: bool = False

    def get_base_weight(self) -> torch.Tensor:
        """The weight of the base layer, dequantized where it is quantized."""
        if self.quantization_backend is not None:
            # Evaluation on some CPUs repacks 4-bit weights into a form that cannot be dequantized; saving undoes it.
            self.get_base_layer().state_dict()
        return super().get_base_weight()

    def is_mergeable(self, adapter_name: str) -> bool:
        """Whether merging the adapter into the base weights is exact: asked of the kind of place and of the parts."""
        return self.merges and parts_merge(self.experts[adapter_name], self.router_of(adapter_name))

    def check_merge(self, adapter_names: Sequence[str], safe_merge: bool = False) -> None:
        """Refuse a merge for reasons beyond `is_mergeable`, without changing anything; there is none by default.

        Args:
            adapter_names: Adapters to merge.
            safe_merge: Whether to look for values that are not finite.

        Raises:
            ValueError: The adapters cannot be merged here.
        """

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the base weights; those that this layer does not hold are left out.

        Args:
            safe_merge: Whether to check the merged weights for values that are not finite before any is stored.
            adapter_names: Adapters to merge; None merges the active ones.

        Raises:
            ValueError: An adapter depends on its input, or merged weights are not finite; nothing has been changed.
        """
        asked = dict.fromkeys(check_adapters_to_merge(self, adapter_names))
        names = [name for name in asked if name in self.experts]
        for name in names:
            if not self.is_mergeable(name):
                raise ValueError(
                    f"Adapter {shown(name)} at {self.place} weighs its experts by the input, or stands beside more "
                    "than a weight; it cannot be merged."
                )
        self.check_merge(names, safe_merge)
        for name in names:
            self.merge_one(name)
            self.merged_adapters.append(name)

    def merge_one(self, adapter_name: str) -> None:
        """Change the base weights as an adapter does; a layer that `merges` says how."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it merges an adapter.")

    def unmerge(self) -> None:
        """Take all merged adapters out of the base weights."""
        if not self.merged:
            warn("Already unmerged. Nothing to do.")
            return
        self.unmerge_to([])

    def unmerge_to(self, adapter_names: Sequence[str]) -> None:
        """Take merged adapters out of the base weights, the last one first, down to those that are named.

        Args:
            adapter_names: Adapters that were merged first, and stay so.
        """

    def weight_changes(self, adapter_name: str) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
        """What merging an adapter makes of each tensor of the wrapped module; nothing is changed.

        Args:
            adapter_name: An adapter of this layer that can be merged.

        Returns:
            Name of a tensor in the wrapped module -> function that gives the merged tensor for the stored one, of the
            same shape and dtype.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what merging changes.")

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether one low-rank pair equals an adapter: a sum that does the same to every token, beside a weight.

        Args:
            adapter_name: Which adapter; one that is not here has none.
        """
        return False

    def scale_layer(self, scale: float) -> None:
        """Accept peft's call to rescale the active adapters; only a scale of one can be honoured."""
        if scale != 1:
            warn(f"Routed adapters cannot be rescaled; scale={shown(scale)} is ignored.")

    def unscale_layer(self, scale: float | None = None) -> None:
        """Accept peft's call to undo a rescaling; there is none to undo."""
