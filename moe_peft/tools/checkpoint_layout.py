"""Which tensors of a checkpoint make up a parameter of a model: files keep their authors' names and one tensor for
each expert, where transformers has names of its own and fused ones.

transformers says how it converts them, both ways; what is written back has to be what was read, name by name.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from ..messages import shown


@dataclass
class Group:
    """Tensors of a checkpoint that are converted together.

    Attributes:
        name: The first parameter that they make up.
        sources: Name in the checkpoint, and the converter's pattern that it fits, in the order of the layers.
        converter: What makes parameters of them; None where one tensor is one parameter.
    """

    name: str
    sources: list[tuple[str, str | None]] = field(default_factory=list)
    converter: WeightConverter | None = None

    @property
    def parameters(self) -> list[str]:
        """Names of all parameters that they make up."""
        if self.converter is None:
            return [self.name]
        targets = [target.replace("\\", "") for target in self.converter.target_patterns]
        first = next((target for target in targets if target in self.name), None)
        return [self.name] if first is None else [self.name.replace(first, target) for target in targets]


class CheckpointLayout:
    """How a checkpoint's tensors and a model's parameters go together.

    Args:
        model: The model, best on the meta device, without adapters.
        names: Names of the checkpoint's tensors.

    Attributes:
        groups: Name of a parameter -> the tensors that make it up.
    """

    def __init__(self, model: Any, names: Iterable[str]) -> None:
        self.model = model
        transforms = get_model_conversion_mapping(model)
        self._renamings = [own for own in transforms if isinstance(own, WeightRenaming)]
        self._converters = [own for own in transforms if isinstance(own, WeightConverter)]
        self._shapes = model.state_dict()
        groups: dict[str, Group] = {}
        for name in sorted(names, key=dot_natural_key):
            renamed, pattern = self._renamed(name)
            group = groups.setdefault(renamed, Group(renamed))
            group.sources.append((name, pattern))
            if pattern is not None and group.converter is None:
                group.converter = next(own for own in self._converters if pattern in own.source_patterns)
        self.groups = {parameter: group for group in groups.values() for parameter in group.parameters}
        # What transformers keeps of loading, and undoes when it saves.
        model._weight_conversions = [own for own in transforms if own.was_used()]

    def _renamed(self, name: str) -> tuple[str, str | None]:
        prefix = self.model.base_model_prefix
        renamed, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self._shapes)
        if renamed not in self._shapes and name in self._shapes:
            renamed, pattern = rename_source_key(name, [], [], prefix, self._shapes)
        return renamed, pattern

    def read(self, group: Group, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """A group's parameters.

        Args:
            group: Which tensors.
            read: Gives a tensor of the checkpoint.
        """
        if group.converter is None:
            return {group.name: read(group.sources[0][0])}
        converter = copy.deepcopy(group.converter)
        for name, pattern in group.sources:
            assert pattern is not None
            converter.add_tensor(group.name, name, pattern, read(name))  # type: ignore[arg-type]
        made = converter.convert(group.name, model=self.model, config=self.model.config)
        return {name: own[0] if isinstance(own, list) else own for name, own in made.items()}

    def written(self, group: Group, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The checkpoint's tensors that a group's parameters are stored as.

        Args:
            group: Which tensors.
            parameters: All that `read` gave, changed.

        Raises:
            ValueError: transformers would store them under other names than those that are there.
        """
        wanted = {name for name, _ in group.sources}
        if group.converter is None:
            return {group.sources[0][0]: parameters[group.name]}
        prefix = f"{self.model.base_model_prefix}."
        found: dict[str, torch.Tensor] = {}
        for name, tensor in revert_weight_conversion(self.model, dict(parameters)).items():
            names = (name, f"{prefix}{name}", re.sub(f"^{re.escape(prefix)}", "", name))
            found[next((own for own in names if own in wanted), name)] = tensor
        if found.keys() != wanted:
            other = sorted(found.keys() ^ wanted)[0]
            raise ValueError(
                f"The checkpoint stores {group.name} in a form that this version of transformers reads and does not "
                f"write ({shown(other)}). Load base and adapter in memory, and call "
                "model.merge_and_unload().save_pretrained(folder)."
            )
        return found
