"""`moe-peft compose`: an adapter of LoRAs from the command line, and errors in one line."""

from __future__ import annotations

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from moe_peft import RoutedConfig, routed_layers
from moe_peft.cli import main
from moe_peft.cli.distil import batches
from moe_peft.tools import choose_loras, compose, fit_centroids
from tests.integrations.trainers import tokenizer
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


def test_loras_become_an_adapter_whose_router_compares_with_texts_of_each(tmp_path, capsys):
    base = str(checkpoint(tiny_llama(), tmp_path / "base"))
    loras = {name: str(trained_lora(tmp_path / name, seed)) for seed, name in enumerate(("law", "tax"))}
    (tmp_path / "law.txt").write_text("w3 w4 w5 w6\nw6 w7 w8\n")
    (tmp_path / "tax.txt").write_text("w20 w21 w22\n")
    words = ["compose", *loras.values(), "--base", base, "--output", f"{tmp_path}/both"]
    wrong = (["law=a"], ["law=a", "tax="], ["law=a", "law=b"], ["law=a", "tax=b", "art=c"], ["law", "tax"])
    for files in wrong:
        assert main([*words, *(word for file in files for word in ("--centroids", file))]) == 1
        assert "must name one file for each LoRA, as in --centroids law=FILE" in capsys.readouterr().err
    given = [word for name in loras for word in ("--centroids", f"{name}={tmp_path}/{name}.txt")]
    assert main([*words, *given, "--top_k", "1"]) == 0
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), f"{tmp_path}/both")
    config = RoutedConfig(task_type="CAUSAL_LM", scorer="centroid", num_experts=2, top_k=1)
    expected = compose(tiny_llama(), loras, config)
    fit_centroids(
        expected, {number: batches(tmp_path / f"{name}.txt", tokenizer()) for number, name in enumerate(loras)}
    )
    for own, other in zip(routed_layers(model), routed_layers(expected), strict=True):
        assert own.router["default"].weight.any()
        torch.testing.assert_close(own.router["default"].weight, other.router["default"].weight)


def test_the_loras_that_are_best_on_texts_of_the_task_are_composed(tmp_path, capsys):
    base = str(checkpoint(tiny_llama(), tmp_path / "base"))
    loras = [str(trained_lora(tmp_path / name, seed)) for seed, name in enumerate(("law", "tax", "art"))]
    (tmp_path / "texts").write_text("w3 w4 w5 w6\nw6 w7 w8\n")
    words = [*loras, "--choose", "2", "--texts", str(tmp_path / "texts"), "--base", base, "--output"]
    assert main(["compose", *words, f"{tmp_path}/two", "--diversity", "0"]) == 0
    printed = capsys.readouterr().out
    texts = batches(tmp_path / "texts", tokenizer())
    expected = choose_loras(tiny_llama(), dict(zip(("law", "tax", "art"), loras, strict=True)), texts, 2, diversity=0)
    assert f"chosen: {expected}" in printed and "2 experts of rank 4" in printed
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), f"{tmp_path}/two")
    first = compose(tiny_llama(), expected.adapters)
    for own, other in zip(routed_layers(model), routed_layers(first), strict=True):
        assert torch.equal(own.experts["default"].A, other.experts["default"].A)
    for given in (["--choose", "2"], ["--texts", "x"], ["--diversity", "1"], ["--choose", "4", "--texts", words[6]]):
        assert main(["compose", *loras, *given, "--base", base, "--output", f"{tmp_path}/out"]) == 1
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_made_is_one_line_and_writes_nothing(tmp_path, capsys):
    base = str(checkpoint(tiny_llama(), tmp_path / "base"))
    one = str(trained_lora(tmp_path / "one"))
    capsys.readouterr()
    for words in ([f"a={one}", f"a={one}"], [str(tmp_path / "nowhere")]):
        assert main(["compose", *words, "--base", base, "--output", str(tmp_path / "out")]) == 1
        assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
