"""The model card says how to load the adapter, once, and keeps what the user wrote."""

from __future__ import annotations

from moe_peft.model_card import HEADING, add_usage

FIELDS = ("LoRAMoE", "y = W0 x + ...", "arXiv 2312.09979", "org/base")


def test_the_section_is_added_once_at_the_end(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("---\nlibrary_name: peft\n---\nMy words.\n")
    add_usage(tmp_path, *FIELDS)
    add_usage(tmp_path, *FIELDS)
    text = card.read_text()
    assert text.startswith("---\nlibrary_name: peft\n---\nMy words.\n") and text.count(HEADING) == 1
    assert 'from_pretrained("org/base")' in text and "```python\nimport moe_peft\n" in text


def test_a_folder_without_a_card_stays_without(tmp_path):
    add_usage(tmp_path, *FIELDS)
    assert not list(tmp_path.iterdir())
