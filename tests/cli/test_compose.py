"""`moe-peft compose`: an adapter of LoRAs from the command line, and errors in one line."""

from __future__ import annotations

from peft import PeftModel
from transformers import AutoModelForCausalLM

from moe_peft import routed_layers
from moe_peft.cli import main
from tests.tiny import tiny_llama
from tests.tools.exported import checkpoint, trained_lora


def test_loras_become_a_saved_adapter_with_a_router_by_their_directions(tmp_path, capsys):
    base = str(checkpoint(tiny_llama(), tmp_path / "base"))
    one, two = (str(trained_lora(tmp_path / str(seed), seed)) for seed in range(2))
    words = ["--base", base, "--output"]
    assert (
        main(["compose", f"law={one}", f"tax={two}", "--directions", "--top_k", "1", *words, f"{tmp_path}/both"]) == 0
    )
    assert "2 experts of rank 4" in capsys.readouterr().out
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), f"{tmp_path}/both")
    assert all(len(layer.experts["default"].A) == 2 for layer in routed_layers(model))


def test_what_cannot_be_made_is_one_line_and_writes_nothing(tmp_path, capsys):
    base = str(checkpoint(tiny_llama(), tmp_path / "base"))
    one = str(trained_lora(tmp_path / "one"))
    capsys.readouterr()
    for words in ([f"a={one}", f"a={one}"], [str(tmp_path / "nowhere")]):
        assert main(["compose", *words, "--base", base, "--output", str(tmp_path / "out")]) == 1
        assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
