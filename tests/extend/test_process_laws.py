"""Two processes on halves of a batch step as one does on the whole: gradients, losses, coefficients, own tensors."""

from __future__ import annotations

import sys

import pytest
import torch

from tests.processes.together import run_together

from .cases import close, name_of
from .worker import choices, stepped

pytestmark = [pytest.mark.multi_process, pytest.mark.slow]
WORLD = 2


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    command = [sys.executable, "-m", "tests.extend.worker"]
    run_together([[*command, str(rank), str(WORLD), str(folder)] for rank in range(WORLD)])
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("choice", choices(), ids=name_of)
def test_two_processes_step_as_one_does_on_the_whole_batch(choice, both):
    expected = stepped(choice)
    for own in both:
        found = own[name_of(choice)]
        assert found.keys() == expected.keys()
        for name, wanted in expected.items():
            kind = name.partition(".")[0]
            advice = {
                "router_loss": "sums must add up over processes, and value be a function of them alone",
                "coefficient": "adapt must read the joined statistics alone, not what this process has seen",
                "tensor": "after_step must read the joined statistics alone, not what this process has seen",
                "grad": "the loss of the joined batch has another gradient: sums must add up over processes",
            }[kind]
            # Weights that are rescaled by a sum near zero amplify the rounding of another order of sums.
            close(found[name], wanted, f"{name}: {advice}", 1e-6)
