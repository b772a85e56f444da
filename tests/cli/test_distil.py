"""`moe-peft distil`: a LoRA from the command line, with the error that its card has."""

from __future__ import annotations

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from moe_peft import RoutedConfig
from moe_peft.cli import main
from moe_peft.cli.distil import batches
from tests.integrations.trainers import tokenizer
from tests.tiny import tiny_llama
from tests.tools.exported import checkpoint, trained


def test_a_lora_and_its_error_are_written(tmp_path, capsys):
    base = checkpoint(tiny_llama(), tmp_path / "base")
    config = RoutedConfig(router="dense", num_experts=2, r=2, target_modules=["up_proj"], task_type="CAUSAL_LM")
    trained(base, tmp_path / "adapter", config)
    (tmp_path / "texts").write_text("w3 w4 w5\n\nw6 w7 w8 w9\n")
    words = ["--texts", str(tmp_path / "texts"), "--rank", "2", "--steps", "2", "--output", str(tmp_path / "lora")]
    assert main(["distil", str(tmp_path / "adapter"), *words]) == 0
    assert "rank 2: loss" in capsys.readouterr().out
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora")
    assert stock.peft_config["default"].r == 2 and "divergence" in (tmp_path / "lora/README.md").read_text()
    assert main(["distil", str(tmp_path / "adapter"), *words]) == 1
    assert "holds files" in capsys.readouterr().err


def test_lines_are_padded_together_and_none_are_refused(tmp_path):
    (tmp_path / "texts").write_text("w3 w4\nw5\nw6 w7 w8\n")
    found = batches(tmp_path / "texts", tokenizer(), rows=2)
    assert [len(own["input_ids"]) for own in found] == [2, 1] and found[0]["attention_mask"].sum() < 2 * 8
    (tmp_path / "texts").write_text("\n")
    with pytest.raises(ValueError, match="no line"):
        batches(tmp_path / "texts", tokenizer())
