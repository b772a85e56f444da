"""`moe-peft add-expert`: a larger adapter from the command line, whole and beside the old one."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from moe_peft import RoutedConfig, routed_layers
from moe_peft.cli import main
from moe_peft.tools import add_expert
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


def test_a_description_makes_the_new_experts_row(tmp_path, capsys):
    base = checkpoint(tiny_llama(), tmp_path / "base")
    router = {"scorer": "domain_embedding", "router_args": {"width": 3, "hidden": 5}, "num_experts": 2, "r": 4}
    model = trained(base, tmp_path / "adapter", RoutedConfig(**router, task_type="CAUSAL_LM"))
    (tmp_path / "vector").write_text("[1, 2.5, -3]")
    words = ["add-expert", str(tmp_path / "adapter"), "--output", str(tmp_path / "out"), "--description"]
    assert main([*words, str(tmp_path / "vector")]) == 0
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    add_expert(model, "new", description=[1, 2.5, -3])
    for own, other in zip(routed_layers(loaded), routed_layers(model), strict=True):
        assert torch.equal(own.router["default"].domains, other.router["new"].domains)
        assert own.router["default"].domains[2].tolist() == [1, 2.5, -3]
    capsys.readouterr()
    for text in ("[1, 2", '["a", 1, 2]', "[1, 2]", "{}", "[]", "[1, NaN, 2]"):
        (tmp_path / "vector").write_text(text)
        other = [*words[:3], str(tmp_path / "none"), "--description", str(tmp_path / "vector")]
        assert main(other) == 1 and "description" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("words", [["--copy_of", "2"], ["--copy_of", "0", "--lora", "x"], ["--lora", "nowhere"]])
def test_what_does_not_fit_is_one_line_and_writes_nothing(tmp_path, words, capsys):
    base = checkpoint(tiny_llama(), tmp_path / "base")
    trained(base, tmp_path / "adapter", RoutedConfig(**FIELDS, task_type="CAUSAL_LM"))
    capsys.readouterr()
    assert main(["add-expert", str(tmp_path / "adapter"), "--output", str(tmp_path / "out"), *words]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("moe-peft add-expert: ") and "Traceback" not in last
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}
