"""Coefficients of router losses that adapt in training, as numbers by name that a checkpoint can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from ..layers import RoutedLayer
from ..messages import shown


class AdaptiveCoefficients:
    """The coefficients of all losses of a model that adapt; one for all places of an adapter.

    They are no tensors of the model. Trainers with `attach` save them in their state; a loop of one's own that saves
    with accelerate calls `accelerator.register_for_checkpointing(AdaptiveCoefficients.of(model))`.
    """

    def __init__(self) -> None:
        self._dicts: dict[str, list[dict[str, float]]] = {}
        self._configured: dict[str, float] = {}

    @classmethod
    def of(cls, model: nn.Module) -> AdaptiveCoefficients:
        """Find them.

        Args:
            model: A model with routed adapters.
        """
        made = cls()
        for layer in (module for module in model.modules() if isinstance(module, RoutedLayer)):
            for adapter, objective in layer.objectives.items():
                for name, loss in objective.losses.items():
                    if loss.adapts:
                        made._dicts.setdefault(f"{adapter}/{name}", []).append(objective.coefficients)
        made._configured = made.get()
        return made

    def get(self) -> dict[str, float]:
        """Coefficient by "<adapter>/<loss>"."""
        return {key: dicts[0][_loss(key)] for key, dicts in self._dicts.items()}

    def set(self, coefficients: Mapping[str, float]) -> None:
        """Set those that are named and exist.

        Args:
            coefficients: As `get` gives them.
        """
        for key in self._dicts.keys() & coefficients.keys():
            for own in self._dicts[key]:
                own[_loss(key)] = float(coefficients[key])

    def state_dict(self) -> dict[str, float]:
        """As `get`, by the name that accelerate and torch ask for."""
        return self.get()

    def load_state_dict(self, state_dict: Mapping[str, float]) -> None:
        """Set all of them.

        Args:
            state_dict: As `state_dict` gave it.

        Raises:
            ValueError: It is of other adapters or losses, or holds what is no coefficient.
        """
        if not isinstance(state_dict, Mapping) or state_dict.keys() != self._dicts.keys():
            found = list(state_dict) if isinstance(state_dict, Mapping) else state_dict
            raise ValueError(
                f"The saved coefficients are those of {shown(found)}, and the model has those of "
                f"{shown(list(self._dicts))}. Load them into a model with the same adapters and losses."
            )
        for key, value in state_dict.items():
            if not isinstance(value, float | int) or isinstance(value, bool) or not 0 <= value < math.inf:
                raise ValueError(
                    f"The saved coefficient of {shown(key)} is {shown(value)}, and must be a finite number from 0. "
                    "Load a state that was saved completely."
                )
        self.set(state_dict)

    def restore(self) -> None:
        """Set all to what they were when they were found."""
        self.set(self._configured)


def _loss(key: str) -> str:
    return key.rpartition("/")[2]
