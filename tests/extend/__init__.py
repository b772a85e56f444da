"""Parts as somebody outside of the package writes them: a file each, and a line each here that registers them."""

from __future__ import annotations

from contextlib import contextmanager
from unittest.mock import patch

from moe_peft.extend import EXPERTS, GATES, LOSSES, SCORERS, SELECTORS

from .activation_norm import ActivationNorm
from .biased_top_k import BiasedTopK
from .cp_diagonal import CpDiagonal
from .null_experts import NullLoadBalancing, NullTopK
from .relu_router import ActiveL1, Positive, Relu
from .task_table import TaskTable


@contextmanager
def registered():
    """Register all of them for a while, so that other tests see the package's own parts."""
    with (
        patch.dict(SCORERS, {"activation_norm": ActivationNorm, "task_table": TaskTable}),
        patch.dict(GATES, {"relu": Relu}),
        patch.dict(SELECTORS, {"positive": Positive, "null_top_k": NullTopK, "biased_top_k": BiasedTopK}),
        patch.dict(EXPERTS, {"cp_diagonal": CpDiagonal}),
        patch.dict(LOSSES, {"active_l1": ActiveL1, "null_load_balancing": NullLoadBalancing}),
    ):
        yield
