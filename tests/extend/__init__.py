"""Parts as somebody outside of the package writes them: a file each, and a line each here that registers them."""

from __future__ import annotations

from contextlib import contextmanager
from unittest.mock import patch

from moe_peft.extend import EXPERTS, GATES, LOSSES, SCORERS, SELECTORS

from .avg_k import AvgK
from .biased_top_k import BiasedTopK
from .cluster_variance import ClusterVariance
from .constants import Constants
from .prototypes import Prototypes
from .softplus import Softplus


@contextmanager
def registered():
    """Register all of them for a while, so that other tests see the package's own parts."""
    with (
        patch.dict(SCORERS, {"avg_k": AvgK}),
        patch.dict(GATES, {"softplus": Softplus}),
        patch.dict(SELECTORS, {"prototypes": Prototypes, "biased_top_k": BiasedTopK}),
        patch.dict(EXPERTS, {"constants": Constants}),
        patch.dict(LOSSES, {"cluster_variance": ClusterVariance}),
    ):
        yield
