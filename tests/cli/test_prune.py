"""`moe-peft prune`: a smaller adapter from the command line, with what it loses in its card."""

from __future__ import annotations

import json

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from moe_peft import RoutedConfig, routed_layers
from moe_peft.cli import main, prune
from tests.tiny import tiny_llama
from tests.tools.exported import checkpoint, trained


@pytest.fixture
def words(tmp_path):
    base = checkpoint(tiny_llama(), tmp_path / "base")
    config = RoutedConfig(num_experts=3, r=2, top_k=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trained(base, tmp_path / "adapter", config)
    (tmp_path / "texts").write_text("w3 w4 w5\nw6 w7 w8 w9\n")
    return ["prune", str(tmp_path / "adapter"), "--texts", str(tmp_path / "texts"), "--output", str(tmp_path / "out")]


def test_the_kept_experts_and_the_loss_are_printed_and_the_loss_is_in_the_card(words, tmp_path, capsys):
    scores = {f"model.layers.{n}.self_attn.q_proj": [0.1, 0.3, 0.2] for n in range(2)}
    (tmp_path / "scores").write_text(json.dumps(scores))
    by = ["--by", "scores", "--scores", str(tmp_path / "scores"), "--json"]
    assert main([*words, "--keep", "2", *by]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["kept"].values()) == [[1, 2], [1, 2]]
    card = (tmp_path / "out/README.md").read_text()
    assert (
        f"| loss after | {found['loss_after']:.4g} |" in card and f"| loss before | {found['loss_before']:.4g}" in card
    )
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "out")
    assert all(len(layer.experts["default"].A) == 2 for layer in routed_layers(loaded))


def test_without_the_norms_before_training_their_change_is_refused_with_the_way_out(words, tmp_path, capsys):
    assert main([*words, "--keep", "1", "--by", "router_change"]) == 1
    assert "router_norms(model)" in capsys.readouterr().err
    assert main([*words, "--keep", "3"]) == 1 and main([*words, "--keep", "1", "--by", "scores"]) == 1
    assert not (tmp_path / "out").exists()


def test_an_interruption_while_it_is_written_leaves_no_half_folder(words, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(prune.prune_experts.__globals__["SmallerAdapter"], "write_card", interrupted)
    before = sorted(tmp_path.iterdir())
    assert main([*words, "--keep", "1"]) == 130
    assert sorted(tmp_path.iterdir()) == before
