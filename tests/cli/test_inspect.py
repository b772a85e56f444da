"""`moe-peft inspect` says what an adapter is, and ends with 1 and one line where it is broken."""

from __future__ import annotations

import pytest
from peft import get_peft_model

import moe_peft
from moe_peft.cli import main
from tests.tiny import tiny_llama


@pytest.fixture
def adapter(tmp_path):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    base.config.name_or_path = base.name_or_path = str(tmp_path / "base")
    config = moe_peft.LoraMoeConfig(task_type="CAUSAL_LM", num_experts=3, r=2, init_weights=False)
    model = get_peft_model(base, config)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_whole_adapter_is_described_and_compared_with_its_base(adapter, capsys):
    assert main(["inspect", str(adapter)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("LoRAMoE (LORAMOE, arXiv 2312.09979)")
    assert "model.layers.*.mlp.down_proj      2        3" in printed
    assert "every tensor that it needs on " in printed and "no expert is dead, and no two are equal" in printed
    assert main(["inspect", str(adapter), "--all"]) == 0
    assert "model.layers.1.mlp.down_proj" in capsys.readouterr().out


def test_a_base_that_is_not_at_hand_is_said(adapter, capsys):
    for file in (adapter.parent / "base").iterdir():
        file.unlink()
    assert main(["inspect", str(adapter)]) == 0
    assert "give it with --base" in capsys.readouterr().out
    assert main(["inspect", str(adapter), "--base", str(adapter.parent / "base")]) == 1
    assert "its configuration cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("case", ["truncated", "no folder", "a file"])
def test_a_broken_one_is_one_line_and_exit_code_1(case, adapter, capsys):
    path = adapter / "adapter_model.safetensors"
    if case == "truncated":
        path.write_bytes(path.read_bytes()[:500])
    name = {"truncated": adapter, "no folder": adapter.parent / "nowhere", "a file": path}[case]
    assert main(["inspect", str(name)]) == 1
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and str(name) in printed.err and "Traceback" not in printed.err
