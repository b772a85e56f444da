"""The rise of memory is that of the work alone, also in a child of a process that once used more."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from moe_peft.tools import peak_memory
from moe_peft.tools.peak_memory import rise_of_memory

MIB = 2**20
CHILD = """
import torch
from moe_peft.tools.peak_memory import rise_of_memory
print(rise_of_memory(lambda: torch.ones(8 * 2**20).sum().item())[1])
"""
pytestmark = pytest.mark.skipif(not peak_memory.RESET.exists(), reason="the system does not count resident memory")


def test_the_rise_is_that_of_the_work_and_not_of_what_was_freed_before_it():
    torch.ones(64 * MIB).sum()
    result, rise = rise_of_memory(lambda: torch.ones(16 * MIB).sum().item())
    assert result == 16 * MIB and 60 * MIB <= rise <= 80 * MIB


def test_a_child_does_not_begin_at_the_peak_of_its_parent():
    torch.ones(400 * MIB).sum()  # 1.6 GB, more than a child with torch uses
    done = subprocess.run([sys.executable, "-c", CHILD], check=True, capture_output=True, text=True, env=os.environ)
    assert 30 * MIB <= int(done.stdout) <= 48 * MIB


def test_a_system_that_does_not_count_runs_the_work_all_the_same(monkeypatch, tmp_path):
    monkeypatch.setattr(peak_memory, "RESET", tmp_path / "nowhere" / "clear_refs")
    assert rise_of_memory(lambda: 3) == (3, None)
