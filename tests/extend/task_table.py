"""Routing by task: the scores of a sample's tokens are a row of a table."""

from __future__ import annotations

import torch
from torch import nn

from moe_peft.extend import Option, Router

NUM_TASKS = Option("num_tasks", 2, "a whole number from 1", lambda v: isinstance(v, int) and v >= 1, "Its rows.")


class TaskTable(Router):
    options = (NUM_TASKS,)
    reads = "groups"
    context_needs = frozenset({"groups"})
    learns = True

    def __init__(self, in_features, num_experts, *, num_tasks=2, init_std=None, **settings):
        super().__init__(in_features, num_experts, **settings)
        self.weight = nn.Parameter((init_std or 1e-3) * torch.randn(num_tasks, self.num_scores))

    def scores(self, x, context):
        groups_S, sequences_T = context.groups, context.sequences
        if groups_S is None:
            raise ValueError("TaskTable needs the task of every sample: give the model the batch's column of groups.")
        if int(groups_S.max()) >= len(self.weight):
            raise ValueError(f"TaskTable has {len(self.weight)} tasks, but a sample is of task {int(groups_S.max())}.")
        tasks_T = groups_S[torch.zeros(len(x), dtype=torch.long) if sequences_T is None else sequences_T]
        return self.weight.float()[tasks_T] if x.dtype != torch.float64 else self.weight.double()[tasks_T]
