"""`moe-peft upcycle`: experts of one LoRA from the command line, and errors in one line."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from moe_peft.cli import main
from tests.tiny import tiny_llama
from tests.tools.exported import checkpoint, logits, trained_lora


def test_a_lora_becomes_experts_that_equal_it_and_what_cannot_be_made_is_one_line(tmp_path, capsys):
    base, one = str(checkpoint(tiny_llama(), tmp_path / "base")), str(trained_lora(tmp_path / "one"))
    words = ["upcycle", one, "--num_experts", "3", "--base", base, "--output"]
    assert main([*words, f"{tmp_path}/more"]) == 0
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), f"{tmp_path}/more")
    expected = logits(PeftModel.from_pretrained(tiny_llama(), one))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)
    capsys.readouterr()
    assert main([*words, f"{tmp_path}/out", "--split"]) == 1
    assert "Traceback" not in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_its_help_is_of_its_own_name(capsys):
    with pytest.raises(SystemExit):
        main(["upcycle", "--help"])
    assert capsys.readouterr().out.startswith("usage: moe-peft upcycle")
