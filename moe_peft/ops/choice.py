"""Which op computes a routed sum, by the work that each would do.

Two GEMMs over all experts do E / K times the work of the selected ones, in the fastest form there is. Skipping work
pays where that is much: on a CPU from (E / K - 1) r > 24, which is what sorting and copying rows cost beside a rank;
on a GPU from E r > 200 + 360 K. Few slots of a small batch, as of one decoded token, are gathered instead of sorted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

AUTO = "auto"
# Work beyond that of the selected experts, in ranks, from which skipping it pays on a CPU.
CPU_SPARE_RANKS = 24
# Ranks of all experts up to which two GEMMs win on a GPU: a constant, and more for each expert that a token uses.
GPU_RANKS, GPU_RANKS_PER_SLOT = 200, 360
# Slots of a batch up to which copying their matrices beats sorting, and ranks up to which two GEMMs beat both.
FEW_SLOTS, FEW_RANKS = 16, 128
# Rows up to which two products, of the experts and of the router, cost less than joining their matrices for one.
SEPARATE_ROWS = 192
# Rows up to which a backward pass keeps what plain operators keep: making it again costs more time than a place has to
# spare, and what 64 rows keep is a sixteenth of a 16-bit matrix of width 2048 at most.
FEW_ROWS = 64


@dataclass(frozen=True)
class Work:
    """What a routed sum has to compute.

    Attributes:
        num_tokens: T.
        num_experts: E.
        num_slots: K, experts a token uses; E for a dense decision.
        r: Rank of one expert.
        dtype: What is computed in.
        device_type: Where, as "cpu" or "cuda".
        compiling: Whether a graph is being made, which is to hold for any number of tokens.
    """

    num_tokens: int
    num_experts: int
    num_slots: int
    r: int
    dtype: torch.dtype
    device_type: str
    compiling: bool = False


def joins(num_tokens: int) -> bool:
    """Whether matrices that read the same input are to be joined for one product; in a graph for any number of rows.

    Args:
        num_tokens: Rows of the input.
    """
    return torch.compiler.is_compiling() or num_tokens > SEPARATE_ROWS


def few_stay_dense(num_tokens: int, num_slots: int, ranks: int) -> bool:
    """Whether a batch has so few slots of so few ranks that two GEMMs are best on any device.

    Args:
        num_tokens: T.
        num_slots: K, experts a token uses.
        ranks: E * r.
    """
    return num_tokens * num_slots <= FEW_SLOTS and (ranks <= FEW_RANKS or num_tokens == 0)


def choose(work: Work) -> str:
    """Choose an op.

    Args:
        work: What it has to compute.

    Returns:
        A key of `IMPLEMENTATIONS`.
    """
    if work.num_slots >= work.num_experts:
        return "dense"
    ranks, on_cpu = work.num_experts * work.r, work.device_type == "cpu"
    if not work.compiling and few_stay_dense(work.num_tokens, work.num_slots, ranks):
        return "dense"
    if not work.compiling and work.num_tokens * work.num_slots <= FEW_SLOTS:
        return "gather"
    if on_cpu and (work.num_experts / work.num_slots - 1) * work.r <= CPU_SPARE_RANKS:
        return "dense"
    if not on_cpu and ranks <= GPU_RANKS + GPU_RANKS_PER_SLOT * work.num_slots:
        return "dense"
    if not on_cpu:
        # The grouped product of a GPU takes 16 bits; a product for each expert would wait for their number.
        return "grouped" if work.dtype in (torch.bfloat16, torch.float16) else "dense"
    return "grouped"
