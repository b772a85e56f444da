"""Competition: in some steps the experts that answer most win, and a linear router learns who wins.

    a_e = mean over outputs of softplus(s B_e A_e x)                                        the answer of expert e
    a competing step    z = log a, so that p = a_e / sum_j a_j, and the router learns softmax(W x) -> softmax(a)
    else                z = W x

CompeteSMoE (Pham et al., arXiv 2402.02526 and 2505.13380): with `norm_topk_prob` the winners weigh a_e over the sum of
theirs. The loss `router_distillation` is what the router learns by; the paper's diversity loss is left out. Each layer
competes in a random share of the optimizer steps, drawn by the number of the step, so that processes, repeated passes
and the passes of one step agree; none before `warm_up`, as experts that start at zero all answer alike. Evaluation
knows W alone. All experts answer in a competing step, whose outputs are made in slices and never kept.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..ops import mean_softplus
from ..part import Option
from ..types import Routing, StepStatistics, TokenContext
from .linear import LinearArgs, LinearRouter

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Compete(LinearRouter):
    """Scores by a matrix that learns which experts answer most.

    Args:
        in_features: D, width of the input.
        num_experts: E.
        compete_rate: Share of the steps, after the warm-up, in which a layer's experts compete.
        warm_up: Optimizer steps before the first competition.
        init_std: See `LinearRouter`.
        **shared: See `LinearRouter`.

    Attributes:
        weight: W (E, D).
        steps: (1,) optimizer steps of training so far, saved with the adapter.
        competes: Whether training passes compete until the next step.
    """

    gives = frozenset({"student_probs", "teacher_probs"})
    needs = frozenset({"responses"})
    frozen = ("steps",)
    varies = frozenset({"compete_rate"})
    options = (
        Option(
            "compete_rate",
            0.1,
            "a number from 0 to 1",
            lambda value: not isinstance(value, bool) and 0 <= value <= 1,
            "Share of the optimizer steps in which a layer's experts compete.",
        ),
        Option(
            "warm_up",
            100,
            "a whole number from 0 to 16777216",
            lambda value: type(value) is int and 0 <= value <= 2**24,
            "Optimizer steps before the first competition.",
        ),
    )

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        compete_rate: float = 0.1,
        warm_up: int = 100,
        init_std: float | None = None,
        **shared: Unpack[LinearArgs],
    ) -> None:
        super().__init__(in_features, num_experts, init_std=init_std, **shared)
        self.compete_rate, self.warm_up, self._layer = compete_rate, warm_up, 0
        self.steps = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.competes = False
        self._draw()

    @property
    def counts(self) -> bool:
        """Whether something changes after each optimizer step: the number of steps does."""
        return True

    def stands_in(self, layer_index: int, num_layers: int) -> None:
        """Draw as the layer of that number; see `Router.stands_in`."""
        self._layer = layer_index
        self._draw()

    @torch.no_grad()
    def after_step(self, statistics: StepStatistics) -> None:
        """Count the step, and draw whether the next one competes; see `Router.after_step`."""
        super().after_step(statistics)
        self.steps.add_(1)
        self._draw()

    def _draw(self) -> None:
        """Say whether training passes compete, by the number of steps and the layer alone."""
        steps = self.steps.detach()
        if steps.is_meta:
            return
        count = int(steps.full_tensor() if isinstance(steps, DTensor) else steps)
        drawn = random.Random(f"{count} {self._layer}").random()
        self.competes = count >= self.warm_up and drawn < self.compete_rate

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._draw()

    def probes(self, context: TokenContext) -> bool:
        """Whether the experts compete in this pass; see `Router.probes`."""
        return self.competes and self.deciding(context).training

    def shared_rows(self, context: TokenContext) -> torch.Tensor | None:
        """The weight, where no noise is on the input; see `Router.shared_rows`."""
        return None if self.jitters(context) else self.weight

    def forward(
        self,
        x: torch.Tensor,
        context: TokenContext,
        responses: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Routing:
        """Decide about each token.

        Args:
            x: (T, D) input.
            context: What is known about the tokens.
            responses: Of the experts, see `Experts.responses`, where they compete.
        """
        student_TE = self.scores(x, self.deciding(context))
        if responses is None:
            return self.decide(student_TE, context)
        answers_TE = mean_softplus(*responses).to(student_TE.dtype)
        # The router's share is zero, so that it has a gradient where no loss teaches it: DDP waits for one of all.
        routing = super().decide(answers_TE.log() + 0 * student_TE, context)
        return _taught(routing, student_TE.softmax(-1), answers_TE.softmax(-1))

    def decide(self, logits_TE: torch.Tensor, context: TokenContext) -> Routing:
        """Decide by the router's own scores, which teach themselves nothing; arguments as in `Router.decide`."""
        probs_TE = logits_TE.softmax(-1)
        return _taught(super().decide(logits_TE, context), probs_TE, probs_TE)


def _taught(routing: Routing, student_TE: torch.Tensor, teacher_TE: torch.Tensor) -> Routing:
    extras = {**routing.extras, "student_probs": student_TE, "teacher_probs": teacher_TE.detach()}
    return replace(routing, extras=extras)
