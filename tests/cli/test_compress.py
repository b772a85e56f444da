"""`moe-peft compress`: size and error are printed, and `decompress` makes an adapter of what it wrote."""

from __future__ import annotations

from moe_peft import LoraMoeConfig
from moe_peft.cli import main
from tests.tiny import tiny_llama
from tests.tools.exported import checkpoint, digest, trained


def test_there_and_back(tmp_path, capsys):
    base = checkpoint(tiny_llama(), tmp_path / "base")
    trained(base, tmp_path / "adapter", LoraMoeConfig(num_experts=3, task_type="CAUSAL_LM"))
    before = digest(tmp_path / "adapter")
    adapter, small, back = (str(tmp_path / name) for name in ("adapter", "small", "back"))
    assert main(["compress", adapter, "--output", small, "--from_zero", "--least_error", "--density", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert "%); " in printed and "relative norm" in printed
    assert main(["compress", adapter, "--output", small]) == 1 and main(["inspect", small]) == 1
    assert "moe-peft decompress" in capsys.readouterr().err
    assert main(["decompress", small, "--output", back]) == 0 and main(["inspect", back]) == 0
    assert digest(tmp_path / "adapter") == before
