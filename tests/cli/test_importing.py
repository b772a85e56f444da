"""`moe-peft import`: the files of others become adapters here, and errors are one line."""

from __future__ import annotations

import json

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from moe_peft import EsftConfig
from moe_peft.cli import main
from moe_peft.cli.importing import reader_of
from moe_peft.tools import export_esft, import_expert_lora, import_mixture
from tests.contract.cases import tiny_olmoe
from tests.tools.exported import checkpoint, digest, logits, trained, trained_lora


def test_a_folder_of_others_becomes_a_saved_adapter(tmp_path, capsys):
    base = checkpoint(tiny_olmoe(), tmp_path / "base")
    model = trained(base, tmp_path / "own", EsftConfig(experts={"1": [0, 2]}, task_type="CAUSAL_LM"))
    export_esft(model, tmp_path / "authors")
    before = digest(tmp_path / "authors")
    words = ["import", str(tmp_path / "authors"), "--base", str(base), "--output", str(tmp_path / "again")]
    assert main(words) == 0 and "default" in capsys.readouterr().out
    assert digest(tmp_path / "authors") == before
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "again")
    assert torch.equal(logits(again), logits(model))


def test_each_form_has_its_reader_and_others_are_one_line(tmp_path, capsys):
    for name, settings, reader in (
        ("mix", {"peft_type": "MIXLORA"}, import_mixture),
        ("experts", {"peft_type": "LORA", "target_parameters": ["a"]}, import_expert_lora),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(settings))
        assert reader_of(tmp_path / name) is reader
    lora = trained_lora(tmp_path / "lora")
    for folder, message in ((lora, "needs no import"), (tmp_path / "nowhere", "holds neither")):
        assert main(["import", str(folder), "--base", "none", "--output", str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
