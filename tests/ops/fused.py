"""Random fused experts with low-rank pairs, in every layout, and slots for them."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from moe_peft.ops.expert_stacks import AdaptedMatrix, FusedExperts, LowRankPairs, PlainStack

D, INNER = 8, 12


def interleaved_and_clamped(x):
    gate, up = x[..., ::2].clamp(max=1.0), x[..., 1::2].clamp(-1.0, 1.0)
    return (up + 1) * gate * torch.sigmoid(1.7 * gate)


def joined(x):
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


LAYOUTS = {
    "joined": {},
    "transposed": {"is_transposed": True},
    "transposed-interleaved-bias": {"is_transposed": True, "gate": interleaved_and_clamped, "bias": True},
    "ungated": {"gate": F.relu, "width": INNER},
    "norm": {"norm": lambda y: F.rms_norm(y, y.shape[-1:])},
    "more-first-matrices": {"zero_experts": 3, "identity_beyond": True},
}


def experts_with_pairs(
    layout: str = "joined",
    num_experts: int = 4,
    *,
    ids: tuple[int, ...] | None = None,
    ranks: tuple[int, ...] = (3,),
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    rank_major: bool = False,
):
    """Fused experts, and all their factors as leaves; `rank_major` keeps B as (O, r, n), as stock peft does."""
    own = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).mul(0.4).to(dtype)

    width, transposed = own.get("width", 2 * INNER), own.get("is_transposed", False)
    table = None
    if ids is not None:
        table = torch.full((num_experts,), len(ids))
        table[list(ids)] = torch.arange(len(ids))
    leaves = []

    def matrix(in_features, out_features, extra=0):
        shape = (in_features, out_features) if transposed else (out_features, in_features)
        stack = PlainStack(
            random(num_experts + extra, *shape), is_transposed=transposed, num_experts=num_experts if extra else None
        )
        bias = random(num_experts, out_features) if own.get("bias") else None
        pairs = []
        for r in ranks:
            count = num_experts if ids is None else len(ids)
            A, B = random(count, r, in_features).requires_grad_(), random(count, r, out_features)
            B = B.permute(2, 1, 0).contiguous() if rank_major else B
            leaves.extend([A, B.requires_grad_()])
            B = B.permute(2, 1, 0) if rank_major else B
            pairs.append(LowRankPairs(A, B, 0.7, ids, table))
        return AdaptedMatrix(stack, bias, tuple(pairs))

    experts = FusedExperts(
        matrix(D, width, own.get("zero_experts", 0)),
        matrix(INNER, D),
        own.get("gate", joined),
        own.get("norm"),
        own.get("identity_beyond", False),
    )
    return experts, leaves


def slots(num_tokens: int, top_k: int, num_experts: int, *, unused: int | None = None, beyond: bool = False, seed=0):
    """Different experts for each token; index, weights (a leaf) and input (a leaf), float64."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, num_experts + 2 * beyond, generator=generator)
    if unused is not None:
        scores[:, unused] = -1.0
    index = scores.topk(top_k, dim=-1).indices
    weights = torch.rand(num_tokens, top_k, generator=generator, dtype=torch.float64).requires_grad_()
    x = torch.randn(num_tokens, D, generator=generator, dtype=torch.float64).requires_grad_()
    return x, index, weights
