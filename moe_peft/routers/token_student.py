"""Two stages: a matrix routes and teaches a table of token ids, then the table routes and no token changes experts.

    stage 1     z = W x,   and the table learns softmax(V[hash of the id]) -> one for the largest of z
    stage 2     z_e = (W x)_e for e = argmax V[hash of the id], and so low for the others that p_e is zero

StableMoE (Dai et al., arXiv 2204.08396): its second stage keeps tokens with their experts, whose weights stay learned,
with `gate="sigmoid"`. The loss `router_distillation` is what the table learns by, a squared distance where the paper
has a cross entropy; `ScheduledValue("stage", {0: 1, 1000: 2})` changes stages. The paper's student embeds words, here
ids share the rows of a table by their hash.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..ops import one_hot
from ..part import Option
from ..types import Routing, TokenContext
from .linear import LinearArgs, LinearRouter
from .task_table import MASKED
from .token_hash import hash_of, ids_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


class TokenStudent(LinearRouter):
    """Scores by a matrix, for the experts that a table of ids lets a token see in the second stage.

    Args:
        in_features: D, width of the input.
        num_experts: E.
        buckets: Rows of the table.
        stage: 1 or 2.
        init_std: See `LinearRouter`.
        **shared: See `LinearRouter`.

    Attributes:
        weight: W (E, D).
        table: V (buckets, E), zero at the start.
    """

    context_needs = frozenset({"token_ids"})
    gives = frozenset({"student_probs", "teacher_probs"})
    varies = frozenset({"stage"})
    options = (
        Option(
            "buckets",
            4096,
            "a whole number from 1 to 1048576",
            lambda value: type(value) is int and 1 <= value <= 2**20,
            "Rows of the table of token ids, which share them by their hash.",
        ),
        Option(
            "stage",
            1,
            "1 or 2",
            lambda value: type(value) is int and value in (1, 2),
            "1: the matrix routes and teaches the table; 2: the table routes.",
        ),
    )

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        buckets: int = 4096,
        stage: int = 1,
        init_std: float | None = None,
        **shared: Unpack[LinearArgs],
    ) -> None:
        super().__init__(in_features, num_experts, init_std=init_std, **shared)
        self.stage = stage
        self.table = nn.Parameter(torch.zeros(buckets, num_experts))

    def forward(self, x: torch.Tensor, context: TokenContext) -> Routing:
        """Decide about each token; arguments as in `Router.forward`.

        Raises:
            ValueError: The batch brings no ids.
        """
        ids_T = ids_of(context, type(self).__name__).to(x.device)
        z_TE = self.scores(x, self.deciding(context))
        taught_TE = self.table.to(z_TE.dtype)[hash_of(ids_T, 0, self.table.shape[0])]
        student_TE = taught_TE.softmax(-1)
        teacher_TE = one_hot(z_TE.argmax(-1), self.num_experts, z_TE.dtype)
        if self.stage == 2:
            seen_TE = one_hot(taught_TE.argmax(-1), self.num_experts, torch.bool)
            z_TE, teacher_TE = z_TE.masked_fill(~seen_TE, MASKED), student_TE.detach()
        # Nothing, so that the table has a gradient, zero, where no loss teaches it: DDP waits for one of every tensor.
        routing = self.decide(z_TE + 0 * taught_TE, context)
        return replace(routing, extras={**routing.extras, "student_probs": student_TE, "teacher_probs": teacher_TE})
