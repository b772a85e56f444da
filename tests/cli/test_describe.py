"""`moe-peft describe` says what an adapter would train and what memory that takes, by flags, by file and by name."""

from __future__ import annotations

import pytest

from moe_peft.cli import main
from tests.tiny import tiny_llama, tiny_mixtral


@pytest.fixture
def base(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    (tmp_path / "base/model.safetensors").unlink()
    return str(tmp_path / "base")


def test_places_parameters_and_memory_are_printed_without_weights(base, capsys):
    words = ["--moe_method", "loramoe", "--moe_num_experts", "3", "--moe_r", "2", "--max_length", "64"]
    assert main(["describe", "--model", base, *words]) == 0
    printed = capsys.readouterr().out
    assert "model.layers.*.mlp.down_proj  Linear" in printed and "LoRAMoE: 3 experts of rank 2" in printed
    assert "learning rate where none is given: 0.0002 in sft" in printed
    for word in ("16-bit, checkpointing", "4-bit, checkpointing", "activations of 64 tokens", "optimizer", "together"):
        assert word in printed
    assert "unknown" not in printed


def test_a_run_file_describes_the_adapter_and_its_other_keys_are_left_out(base, capsys, tmp_path):
    (tmp_path / "run.yaml").write_text(f"model_name_or_path: {base}\nmoe_method: sira\nlearning_rate: 0.1\n")
    assert main(["describe", "--config", str(tmp_path / "run.yaml")]) == 0
    assert "SiRA: 16 experts of rank 4" in capsys.readouterr().out


def test_a_sparse_model_is_described_too(tmp_path, capsys):
    tiny_mixtral().save_pretrained(tmp_path)
    assert main(["describe", "--model", str(tmp_path), "--moe_method", "expert_lora", "--all_places"]) == 0
    printed = capsys.readouterr().out
    assert "model.layers.1.mlp.experts" in printed and "together" in printed and "unknown" not in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--model_name_or_path is missing"),
        (["--model", "./nowhere"], "there is no such folder"),
        (["--model", "{base}", "--moe_method", "sira", "--moe_variant", "R"], "has no meaning for --moe_method sira"),
        (["--model", "{base}", "--max_length", "0"], "--max_length 0 must be at least 1"),
        (["--model", "nobody/nothing"], "--model nobody/nothing is no folder here, and cannot be fetched"),
    ],
)
def test_what_cannot_work_is_one_line(words, message, base, capsys):
    assert main(["describe", *(word.format(base=base) for word in words)]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("moe-peft describe: ") and message in printed and printed.count("\n") == 1
