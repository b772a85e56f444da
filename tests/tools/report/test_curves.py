"""Curves of a history are the means over the places that were measured at a step."""

from __future__ import annotations

import math

import pytest
import torch

from moe_peft.tools.report.curves import curves, read_curves


def test_numbers_of_each_step_are_means_over_the_places_measured_there():
    nan = float("nan")
    a = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.75, 0.25]])
    b = torch.tensor([[0.5, 0.5], [nan, nan], [0.5, 0.5]])
    found = curves([10, 20, 30], [a, b])
    quarter = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert found.entropy[0] == (1, 1, 1) and found.entropy[1] == (0, 0, 0)
    assert found.entropy[2] == pytest.approx(((1 + quarter) / 2, quarter, 1))
    assert found.busiest == pytest.approx([1, 2, 1.25])
    assert found.moved == pytest.approx([0, 0.5, 0.25])


def test_a_folder_without_a_history_has_no_curves(tmp_path):
    assert read_curves(tmp_path) is None


def test_a_history_is_read_as_it_was_saved(made):
    assert made.curves.steps == [10, 20, 30] and len(made.curves.entropy) == 3
