"""What one layer needs for one adapter: experts, and who decides about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ..routers import Router


@dataclass(frozen=True)
class RoutedParts:
    """What one layer needs for one adapter.

    Attributes:
        experts: Bank of experts.
        router: Decides about them; None where the backbone's routing is followed.
        objective: Router losses.
        selection: Experts of the backbone that the bank's experts go with, ascending; None for all of them.
    """

    experts: nn.Module
    router: Router | None = None
    objective: Callable | None = None
    selection: tuple[int, ...] | None = None
