"""`moe-peft add-expert`: a larger adapter from the command line, whole and beside the old one."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from moe_peft import RoutedConfig, routed_layers
from moe_peft.cli import main
from tests.tiny import tiny_llama
from tests.tools.exported import checkpoint, digest, trained, trained_lora

FIELDS = {"router": "dense", "num_experts": 2, "r": 4, "target_modules": ["q_proj", "up_proj"]}


def test_an_expert_comes_last_and_what_was_trained_beside_stays(tmp_path, capsys):
    base = checkpoint(tiny_llama(), tmp_path / "base")
    config = RoutedConfig(**FIELDS, task_type="CAUSAL_LM", modules_to_save=["lm_head"], trainable_token_indices=[3])
    model = trained(base, tmp_path / "adapter", config)
    (tmp_path / "adapter/tokenizer_config.json").write_bytes((base / "tokenizer_config.json").read_bytes())
    (tmp_path / "adapter/tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    before = digest(tmp_path / "adapter")
    lora = str(trained_lora(tmp_path / "stock", r=3))
    for name, words in (("copy", ["--copy_of", "1"]), ("lora", ["--lora", lora]), ("empty", [])):
        folder = tmp_path / name
        assert main(["add-expert", str(tmp_path / "adapter"), "--output", str(folder), *words]) == 0
        assert "3 experts of rank 4" in capsys.readouterr().out
        assert (folder / "tokenizer.json").is_file() and not list(tmp_path.glob(".*"))
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
        for old, new in zip(routed_layers(model), routed_layers(loaded), strict=True):
            assert torch.equal(new.experts["default"].A[:2], old.experts["default"].A)
        for own, other in ((model, loaded),):
            heads = [it.get_base_model().lm_head.modules_to_save["default"].weight for it in (own, other)]
            rows = [
                it.get_base_model().model.embed_tokens.token_adapter.trainable_tokens_delta["default"]
                for it in (own, other)
            ]
            assert torch.equal(*heads) and torch.equal(*rows)
    assert digest(tmp_path / "adapter") == before


@pytest.mark.parametrize("words", [["--copy_of", "2"], ["--copy_of", "0", "--lora", "x"], ["--lora", "nowhere"]])
def test_what_does_not_fit_is_one_line_and_writes_nothing(tmp_path, words, capsys):
    base = checkpoint(tiny_llama(), tmp_path / "base")
    trained(base, tmp_path / "adapter", RoutedConfig(**FIELDS, task_type="CAUSAL_LM"))
    capsys.readouterr()
    assert main(["add-expert", str(tmp_path / "adapter"), "--output", str(tmp_path / "out"), *words]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("moe-peft add-expert: ") and "Traceback" not in last
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}
