"""Routing by task: a row of a table scores the experts for all tokens of a sample.

    z = table[task]     or, with a width,     z = W emb[task]

Task-level mixtures of experts (Ye et al., arXiv 2205.12701) and MOELoRA (arXiv 2310.18339, the form with a width). A
mask of the experts that each task may use gives SkillNet (arXiv 2204.12184). The task of a sample is its group in the
batch; `merge_for_task` makes an adapted model that serves one task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from ..forward.host_checks import operator_of
from ..messages import shown
from ..part import Option
from ..types import TokenContext
from .router import Router, RouterArgs

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Score of an expert that a task may not use: its probability is zero under every gate.
MASKED = -1e9


def _is_mask(value: Any) -> bool:
    return value is None or all(
        {*row} <= {0, 1} and any(row) and len(row) == len(value[0]) for row in value if isinstance(row, Sequence)
    )


class TaskTable(Router):
    """Scores by the task of a sample.

    Args:
        in_features: Taken for the signature that scorers share.
        num_experts: E.
        num_tasks: Rows of the table.
        width: Width of a task's embedding; None for a table of scores.
        task_mask: For each task, a list with one or zero for each expert; None lets all tasks use all experts.
        init_std: Standard deviation of table and embedding at the start; None takes 1e-3 for a table, and one for an
            embedding, with W as in `nn.Linear`. Under a gate that needs scores above zero all entries start above it.
        **shared: See `Router`.

    Attributes:
        weight: (num_tasks, num_scores), or W (num_scores, width).
        embedding: (num_tasks, width), where there is a width.
    """

    reads = "groups"
    context_needs = frozenset({"groups"})
    learns = True
    options = (
        Option(
            "num_tasks",
            2,
            "a whole number from 1 to 1048576",
            lambda value: type(value) is int and 1 <= value <= 2**20,
            "Tasks, numbered from zero in the batch's column of groups.",
        ),
        Option(
            "width",
            None,
            "a whole number from 1 to 65536, or None",
            lambda value: value is None or (type(value) is int and 1 <= value <= 2**16),
            "Width of a task's embedding; None for a table of scores.",
        ),
        Option(
            "task_mask",
            None,
            "None, or a list with a row for each task: one or zero for each expert, not all zero",
            _is_mask,
            "Experts that each task may use.",
        ),
    )

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        num_tasks: int = 2,
        width: int | None = None,
        task_mask: Sequence[Sequence[int]] | None = None,
        init_std: float | None = None,
        **shared: Unpack[RouterArgs],
    ) -> None:
        super().__init__(in_features, num_experts, **shared)
        self.num_tasks, self.task_mask = num_tasks, task_mask
        self.embedding: nn.Parameter | None = None
        if width is None:
            self.weight = nn.Parameter(torch.empty(num_tasks, self.num_scores))
            self.start_without_tokens(self.weight, 1e-3 if init_std is None else init_std)
        else:
            self.embedding = nn.Parameter(torch.empty(num_tasks, width))
            lowest = 0 if self.gate.needs_positive else -1
            self.weight = nn.Parameter(torch.empty(self.num_scores, width).uniform_(lowest, 1) / width**0.5)
            self.start_without_tokens(self.embedding, 1.0 if init_std is None else init_std)

    @classmethod
    def misfit(cls, options: Mapping[str, Any], sizes: Mapping[str, int]) -> str | None:
        """See `Part.misfit`."""
        mask, wanted = options["task_mask"], (options["num_tasks"], sizes["num_experts"])
        if mask is None or (len(mask) == wanted[0] and all(len(row) == wanted[1] for row in mask)):
            return None
        return f"task_mask={shown(mask)} must have a row for each of num_tasks={wanted[0]}, of {wanted[1]} entries"

    @classmethod
    def known_groups(cls, options: Mapping[str, Any]) -> frozenset[int]:
        """See `Part.known_groups`."""
        return frozenset(range(options["num_tasks"]))

    def scores(self, x: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Score the experts for each token by its sample's task; arguments as in `Router.scores`.

        Raises:
            ValueError: The batch brings no tasks, or one that the table has no row for.
        """
        dtype, tasks_S = torch.promote_types(x.dtype, torch.float32), self._tasks(context)
        with torch.autocast(x.device.type, enabled=False):
            table_NE = self.weight.to(dtype)
            if self.embedding is not None:
                table_NE = F.linear(self.embedding.to(dtype), table_NE)
        if self.task_mask is not None:
            allowed_NE = torch.tensor(self.task_mask, dtype=torch.bool, device=x.device)
            allowed_NE = F.pad(allowed_NE, (0, self.num_scores - self.num_experts), value=True)
            table_NE = table_NE.masked_fill(~allowed_NE, MASKED)
        sequences_T = context.sequences
        if sequences_T is None:
            sequences_T = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
        return table_NE[tasks_S.to(x.device)[sequences_T]]

    def _tasks(self, context: TokenContext) -> torch.Tensor:
        """(S,) task of each sequence; on a device the batch's reader has looked at them."""
        tasks_S = context.groups
        if tasks_S is None:
            raise ValueError(
                f"{type(self).__name__} needs the task of every sample: give the model the batch's column of groups "
                "(task_type, or the adapter's group_column), or call it within moe_peft.groups(model, task_type=...)."
            )
        if tasks_S.device.type != "cpu":
            return tasks_S
        if torch.compiler.is_compiling():
            return _known_tasks(tasks_S, [self.num_tasks], type(self).__name__)
        check_tasks(tasks_S, [self.num_tasks], type(self).__name__)
        return tasks_S


def check_tasks(tasks: torch.Tensor, num_tasks: Sequence[int], owner: str) -> None:
    """Refuse tasks that a table has no row for.

    Args:
        tasks: (S,) task of each sequence.
        num_tasks: The number of rows, alone.
        owner: Class of the table, for the message.

    Raises:
        ValueError: A task is below zero, or there are not as many.
    """
    lowest, largest = (int(tasks.min()), int(tasks.max())) if tasks.numel() else (0, 0)
    if lowest < 0 or largest >= num_tasks[0]:
        raise ValueError(
            f"{owner} has num_tasks={num_tasks[0]}, but a sample is of task {lowest if lowest < 0 else largest}. "
            f"Number the tasks from 0, and set router_args={{'num_tasks': {max(largest + 1, 1)}}}."
        )


_known_tasks = operator_of("known_tasks", check_tasks)
