"""`moe-peft decompress` refuses what was not compressed, in one line."""

from __future__ import annotations

from moe_peft import LoraMoeConfig
from moe_peft.cli import main
from tests.tiny import tiny_llama
from tests.tools.exported import checkpoint, trained


def test_an_adapter_needs_no_decompressing(tmp_path, capsys):
    base = checkpoint(tiny_llama(), tmp_path / "base")
    trained(base, tmp_path / "adapter", LoraMoeConfig(num_experts=2))
    capsys.readouterr()
    assert main(["decompress", str(tmp_path / "adapter"), "--output", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("moe-peft decompress: ") and not (tmp_path / "out").exists()
