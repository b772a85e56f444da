"""Coefficients of router losses that adapt in training, as numbers by name that a checkpoint can hold."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..layers import RoutedLayer


class AdaptiveCoefficients:
    """The coefficients of all losses of a model that adapt; one for all places of an adapter."""

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

    def restore(self) -> None:
        """Set all to what they were when they were found."""
        self.set(self._configured)


def _loss(key: str) -> str:
    return key.rpartition("/")[2]
