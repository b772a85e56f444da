"""Checks of a batch's numbers that compiled code makes when it runs, as nobody can look at them where it is traced."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

# A check of whole numbers by some limits, with a name for its message.
HostCheck = Callable[[torch.Tensor, Sequence[int], str], None]


def operator_of(name: str, check: HostCheck) -> Callable[[torch.Tensor, Sequence[int], str], torch.Tensor]:
    """An operator that compiled graphs hold as a whole, and that raises what a check does.

    Args:
        name: Its name among the operators of the package.
        check: Called with a tensor of integers, what limits them, and a name.

    Returns:
        A function of the same arguments that returns a copy of the numbers, to be used instead of them: a graph keeps
        nothing that nobody uses.
    """

    def checked(numbers: torch.Tensor, limits: Sequence[int], owner: str) -> torch.Tensor:
        check(numbers, limits, owner)
        return numbers.clone()

    schema = "(Tensor numbers, int[] limits, str owner) -> Tensor"
    operator = torch.library.custom_op(f"moe_peft::{name}", checked, mutates_args=(), schema=schema)
    operator.register_fake(lambda numbers, limits, owner: torch.empty_like(numbers))
    return operator


def assert_known(numbers: torch.Tensor, known: Sequence[int], message: str) -> None:
    """Let a device stop where a number is unknown, without waiting for it.

    Args:
        numbers: Integers of any shape.
        known: Those that may occur.
        message: What the device says.
    """
    allowed = torch.tensor(known, dtype=numbers.dtype, device=numbers.device)
    torch._assert_async(torch.isin(numbers, allowed).all(), message)
