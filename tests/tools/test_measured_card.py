"""Figures in a card stand once, and the rest of the card stays."""

from __future__ import annotations

import pytest

from moe_peft.tools.measured_card import add_measured


def test_a_section_takes_the_place_of_its_older_self_and_nothing_else(tmp_path):
    with pytest.raises(ValueError, match="holds no adapter_config"):
        add_measured(tmp_path, "Loss", "It is:", {"loss": 1.0})
    assert not list(tmp_path.iterdir())
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "README.md").write_text("# A\n\n## Loss of weight\n\nstays\n")
    for loss in (1.0, 2.0):
        add_measured(tmp_path, "Loss", "It is:", {"loss_after": loss})
    text = (tmp_path / "README.md").read_text()
    assert "stays" in text and "| loss after | 2 |" in text and "| 1 |" not in text
    assert text.count("## Loss\n") == 1
