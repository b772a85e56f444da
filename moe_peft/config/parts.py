"""What one layer needs for one adapter: experts, and who decides about them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..experts import Selection
from ..forward.objective import RouterObjective
from ..part import ModulePart
from ..routers import Router

# Kinds of placement around weights, into which an adapter can be merged; around a whole block there is none.
AROUND_WEIGHTS = ("linear", "scaled", "slices", "matrices")


@dataclass(frozen=True)
class RoutedParts:
    """What one layer needs for one adapter.

    Attributes:
        experts: Bank of experts.
        router: Decides about them; None where the backbone's routing is followed.
        objective: Router losses; None for none.
        selection: Experts of the backbone that the bank's experts go with; None for all of them.
    """

    experts: nn.Module
    router: Router | None = None
    objective: RouterObjective | None = None
    selection: Selection | None = None

    @property
    def mergeable(self) -> bool:
        """Whether they do the same for every input; see `parts_merge`."""
        return parts_merge(self.experts, self.router)


def parts_merge(experts: nn.Module, router: Router | None) -> bool:
    """Whether what the parts of one layer do can be merged into a weight, where the kind of place has one.

    Args:
        experts: Bank of experts; as a part, its `mergeable` says whether that holds under weights that are always the
            same.
        router: Its `mergeable` says whether the weights are; None for experts that the backbone itself weighs.
    """
    return isinstance(experts, ModulePart) and experts.mergeable and (router is None or router.mergeable)
