"""Which of a backbone's experts serve a data set: score them, select them, show the selection."""

from __future__ import annotations

from .join import join_selections
from .report import overlap_table, plot_selection, selection_table
from .scores import ExpertScores
from .scoring import score_experts
from .select import select_experts
from .selected import ExpertSelection

__all__ = [
    "ExpertScores",
    "ExpertSelection",
    "join_selections",
    "overlap_table",
    "plot_selection",
    "score_experts",
    "select_experts",
    "selection_table",
]
