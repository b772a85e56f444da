"""`moe-peft export`: each form from the command line, and errors in one line."""

from __future__ import annotations

import json

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from moe_peft import EsftConfig, ExpertLoraConfig, LoraMoeConfig, MoloraConfig, RoutedConfig
from moe_peft.cli import main
from moe_peft.tools import average_experts
from tests.contract.cases import tiny_olmoe
from tests.tiny import tiny_llama
from tests.tools.exported import checkpoint, digest, logits, tensors, trained


def test_each_form_is_written_and_loads(tmp_path, capsys):
    base = checkpoint(tiny_olmoe(), tmp_path / "base")
    slices = trained(base, tmp_path / "slices", EsftConfig(experts={"1": [0, 2]}, task_type="CAUSAL_LM"))
    trained(base, tmp_path / "pairs", ExpertLoraConfig(r=2))
    for name, form in (("slices", "merged"), ("slices", "experts"), ("pairs", "experts"), ("pairs", "lora")):
        assert main(["export", str(tmp_path / name), "--to", form, "--output", str(tmp_path / f"{name}-{form}")]) == 0
        assert "holds" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "slices-merged")
    torch.testing.assert_close(logits(merged), logits(slices), rtol=0, atol=2e-5)
    assert json.loads((tmp_path / "slices-experts/expert_cfg.json").read_text())["experts"] == {"1": [0, 2]}
    assert any(".experts.0.up_proj.lora_A" in key for key in tensors(tmp_path / "pairs-experts"))
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "pairs-lora")


def test_the_mean_of_experts_is_written_with_its_error(tmp_path, capsys):
    base = checkpoint(tiny_llama(), tmp_path / "base")
    config = RoutedConfig(router="random", num_experts=3, r=2, task_type="CAUSAL_LM")
    model = trained(base, tmp_path / "adapter", config)
    words = ["export", str(tmp_path / "adapter"), "--average", "--to"]
    assert main([*words, "lora", "--output", str(tmp_path / "mean")]) == 0
    printed = capsys.readouterr().out
    assert str(average_experts(model, tmp_path / "same")) in printed and "mean of its experts" in printed
    assert digest(tmp_path / "mean").keys() == digest(tmp_path / "same").keys()
    one, other = (tensors(tmp_path / name) for name in ("mean", "same"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], own) for key, own in other.items())
    assert main([*words, "merged", "--output", str(tmp_path / "out")]) == 1
    assert "Write --to lora" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_has_no_equal_is_one_line_and_writes_nothing(tmp_path, capsys):
    base = checkpoint(tiny_llama(), tmp_path / "base")
    trained(base, tmp_path / "routed", LoraMoeConfig(r=2, num_experts=2))
    trained(base, tmp_path / "one", MoloraConfig(num_experts=1))
    capsys.readouterr()
    for words in (
        [str(tmp_path / "routed"), "--to", "lora"],
        [str(tmp_path / "routed"), "--to", "merged"],
        [str(tmp_path / "one"), "--to", "experts"],
        [str(tmp_path / "one"), "--to", "merged", "--base", str(tmp_path / "nowhere")],
    ):
        assert main(["export", *words, "--output", str(tmp_path / "out")]) == 1
        printed = capsys.readouterr().err.splitlines()
        assert printed[-1].startswith("moe-peft export: ") and "Traceback" not in str(printed)
    assert not (tmp_path / "out").exists()
