"""An adapter that was made is written whole, or not at all."""

from __future__ import annotations

import pytest
from peft import get_peft_model

from moe_peft import MoloraConfig
from moe_peft.cli.made import BEFORE, MADE, save_made
from tests.tiny import tiny_llama


def test_the_made_adapter_alone_is_written_and_what_fails_leaves_nothing(tmp_path):
    model = get_peft_model(tiny_llama(), MoloraConfig(num_experts=2), adapter_name=BEFORE)
    model.add_adapter(MADE, MoloraConfig(num_experts=3))
    (tmp_path / "source").mkdir()
    (tmp_path / "source/tokenizer.json").write_text("{}")

    def stopped(folder):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_made(model, tmp_path / "out", tmp_path / "source", finish=stopped)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    save_made(model, tmp_path / "out", tmp_path / "source")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} and BEFORE not in names
