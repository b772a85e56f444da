"""Slow float64 references of every formula: Python loops over tokens and experts, nothing shared with the package.

Everything is built from differentiable torch scalars and vectors, so gradients come from autograd. Matrices have the
layout of the formulas: A (E, r, D) and B (E, O, r). A decision is a list with one dict {expert: weight} per token.
"""

from __future__ import annotations

import math

import torch

Gates = list[dict[int, torch.Tensor]]


def softmax(z: list[torch.Tensor]) -> list[torch.Tensor]:
    largest = max(value.item() for value in z)
    exps = [torch.exp(value - largest) for value in z]
    total = sum(exps)
    return [value / total for value in exps]


def router_logits(x: torch.Tensor, Wg: torch.Tensor) -> list[list[torch.Tensor]]:
    return [[(Wg[e] * x[t]).sum() for e in range(Wg.shape[0])] for t in range(x.shape[0])]


def router_probs(x: torch.Tensor, Wg: torch.Tensor) -> list[list[torch.Tensor]]:
    return [softmax(z) for z in router_logits(x, Wg)]


def drop_gates(probs: list[list[torch.Tensor]], kept: list[list[bool]], p: float) -> list[list[torch.Tensor]]:
    """Inverted dropout with a given mask: a survivor is divided by 1 - p, the rest is zero."""
    return [
        [g / (1 - p) if keep else torch.zeros_like(g) for g, keep in zip(row, keeps, strict=True)]
        for row, keeps in zip(probs, kept, strict=True)
    ]


def choose(probs: list[list[torch.Tensor]], top_k: int) -> list[list[int]]:
    """The top_k experts of each token, best first; a gate of zero is not chosen."""
    chosen = []
    for row in probs:
        order = sorted(range(len(row)), key=lambda e: -row[e].item())
        chosen.append([e for e in order[:top_k] if row[e].item() > 0])
    return chosen


def top_k_gates(
    probs: list[list[torch.Tensor]], top_k: int, *, normalise: bool = False, factor: float = 1.0
) -> tuple[Gates, list[list[int]]]:
    gates: Gates = []
    chosen = choose(probs, top_k)
    for row, experts in zip(probs, chosen, strict=True):
        total = sum(row[e] for e in experts) if normalise and experts else 1.0
        gates.append({e: factor * row[e] / total for e in experts})
    return gates, chosen


def dense_gates(probs: list[list[torch.Tensor]]) -> Gates:
    return [dict(enumerate(row)) for row in probs]


def overflow(
    chosen: list[list[int]],
    *,
    num_experts: int,
    top_k: int,
    capacity_factor: float,
    sequences: list[int],
    valid: list[bool],
    by_choice: bool = False,
) -> set[tuple[int, int]]:
    """(token, expert) pairs over capacity: each sequence serves its own valid tokens, C of them per expert."""
    dropped = set()
    for sequence in sorted(set(sequences)):
        tokens = [t for t in range(len(chosen)) if sequences[t] == sequence and valid[t]]
        capacity = max(1, math.ceil(capacity_factor * top_k * len(tokens) / num_experts))
        if by_choice:
            queue = [(t, chosen[t][c]) for c in range(top_k) for t in tokens if c < len(chosen[t])]
        else:
            queue = [(t, e) for t in tokens for e in chosen[t]]
        served = [0] * num_experts
        for t, e in queue:
            if served[e] == capacity:
                dropped.add((t, e))
            else:
                served[e] += 1
    return dropped


def routed_layer(
    x: torch.Tensor, W0: torch.Tensor, A: torch.Tensor, B: torch.Tensor, gates: Gates, *, scaling: float
) -> torch.Tensor:
    """y_t = W0 x_t + s * sum_e g_te B_e (A_e x_t), A (E, r, D), B (E, O, r)."""
    rows = []
    for t in range(x.shape[0]):
        y = W0 @ x[t]
        for e, gate in gates[t].items():
            y = y + scaling * gate * (B[e] @ (A[e] @ x[t]))
        rows.append(y)
    return torch.stack(rows) if rows else x.new_zeros(0, W0.shape[0])


def loramoe_layer(x, W0, Wg, A, B, *, lora_alpha: float) -> torch.Tensor:
    return routed_layer(x, W0, A, B, dense_gates(router_probs(x, Wg)), scaling=lora_alpha / A.shape[1])


def molora_layer(x, W0, Wg, A, B, *, lora_alpha: float, top_k: int | None = None) -> torch.Tensor:
    probs = router_probs(x, Wg)
    gates = dense_gates(probs) if top_k is None else top_k_gates(probs, top_k)[0]
    return routed_layer(x, W0, A, B, gates, scaling=lora_alpha / A.shape[1])


def sira_layer(
    x,
    W0,
    Wg,
    A,
    B,
    *,
    lora_alpha: float,
    top_k: int,
    kept: list[list[bool]] | None = None,
    p: float = 0.0,
    capacity_factor: float | None = None,
    sequences: list[int] | None = None,
    valid: list[bool] | None = None,
    by_choice: bool = False,
) -> torch.Tensor:
    probs = router_probs(x, Wg)
    if kept is not None:
        probs = drop_gates(probs, kept, p)
    gates, chosen = top_k_gates(probs, top_k)
    if capacity_factor is not None:
        dropped = overflow(
            chosen,
            num_experts=Wg.shape[0],
            top_k=top_k,
            capacity_factor=capacity_factor,
            sequences=sequences or [0] * x.shape[0],
            valid=valid or [True] * x.shape[0],
            by_choice=by_choice,
        )
        gates = [{e: g for e, g in row.items() if (t, e) not in dropped} for t, row in enumerate(gates)]
    return routed_layer(x, W0, A, B, gates, scaling=lora_alpha / A.shape[1])


def localized_balancing(
    gates: Gates,
    num_experts: int,
    *,
    sequences: list[int],
    valid: list[bool] | None = None,
    expert_groups: list[int] | None = None,
    groups: list[int] | None = None,
    delta: float = 0.0,
    mode: str = "paper",
) -> torch.Tensor:
    """var_unbiased(I * Q) / (mean(I * Q)^2 + 1e-10) with Q the mean gate of each sequence's valid tokens."""
    valid = valid or [True] * len(gates)
    entries = []
    for m in sorted(set(sequences)):
        tokens = [t for t in range(len(gates)) if sequences[t] == m and valid[t]]
        if not tokens:
            continue
        for n in range(num_experts):
            mass = sum(gates[t].get(n, torch.zeros((), dtype=torch.float64)) for t in tokens)
            shift = 1.0
            if expert_groups is not None:
                own = expert_groups[n] == groups[m]
                shift = 1 + delta if own == (mode == "paper") else 1 - delta
            entries.append(shift * mass / len(tokens))
    mean = sum(entries) / len(entries)
    variance = sum((z - mean) ** 2 for z in entries) / max(len(entries) - 1, 1)
    return variance / (mean**2 + 1e-10)


def _mean_prob(probs: list[list[torch.Tensor]], e: int, tokens: list[int]) -> torch.Tensor:
    return sum(probs[t][e] for t in tokens) / len(tokens)


def load_balancing(probs, chosen: list[list[int]], valid: list[bool] | None = None) -> torch.Tensor:
    """E * sum_e f_e P_e with f the share of all requests: it sums to one."""
    num_experts = len(probs[0])
    tokens = [t for t in range(len(probs)) if valid is None or valid[t]]
    requests = sum(len(chosen[t]) for t in tokens)
    total = 0.0
    for e in range(num_experts):
        share = sum(e in chosen[t] for t in tokens) / requests
        total = total + share * _mean_prob(probs, e, tokens)
    return num_experts * total


def gshard_load_balancing(probs, chosen: list[list[int]], valid: list[bool] | None = None) -> torch.Tensor:
    """1/E * sum_e (c_e / n) P_e with c_e the tokens that asked for e."""
    num_experts = len(probs[0])
    tokens = [t for t in range(len(probs)) if valid is None or valid[t]]
    total = 0.0
    for e in range(num_experts):
        total = total + sum(e in chosen[t] for t in tokens) / len(tokens) * _mean_prob(probs, e, tokens)
    return total / num_experts


def z_loss(logits: list[list[torch.Tensor]], valid: list[bool] | None = None) -> torch.Tensor:
    tokens = [t for t in range(len(logits)) if valid is None or valid[t]]
    return sum(torch.log(sum(torch.exp(z) for z in logits[t])) ** 2 for t in tokens) / len(tokens)


def importance(gates: Gates, num_experts: int, valid: list[bool] | None = None) -> torch.Tensor:
    """Population variance of the experts' gate mass over its squared mean."""
    tokens = [t for t in range(len(gates)) if valid is None or valid[t]]
    mass = [sum(gates[t].get(e, torch.zeros((), dtype=torch.float64)) for t in tokens) for e in range(num_experts)]
    mean = sum(mass) / num_experts
    return sum((value - mean) ** 2 for value in mass) / num_experts / (mean**2 + 1e-10)
