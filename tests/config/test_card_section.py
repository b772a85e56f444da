"""The model card says how to load the adapter, once, and keeps what the user wrote."""

from __future__ import annotations

import dataclasses

from peft import get_peft_model

from moe_peft import EsftConfig, LoraMoeConfig, MovConfig, PerftConfig
from moe_peft.config.card_section import BEGIN, END, AdapterFacts, section, write_section
from tests.tiny import tiny_llama

FACTS = AdapterFacts("LoRAMoE", "LORAMOE", "y = W0 x + ...", "arXiv 2312.09979", "CAUSAL_LM", base_model="org/base")


def test_the_section_is_added_at_the_end_and_replaced_where_it_is(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("---\nlibrary_name: peft\n---\nMy words.\n")
    write_section(tmp_path, FACTS)
    card.write_text(card.read_text() + "\nMore words.\n")
    write_section(tmp_path, dataclasses.replace(FACTS, base_model="org/other"))
    text = card.read_text()
    assert text.startswith(f"---\nlibrary_name: peft\n---\nMy words.\n\n{BEGIN}\n")
    assert text.endswith(f"{END}\n\nMore words.\n") and text.count(BEGIN) == 1
    assert "org/other" in text and "org/base" not in text


def test_a_folder_without_a_card_stays_without(tmp_path):
    write_section(tmp_path, FACTS)
    assert not list(tmp_path.iterdir())


def test_the_first_line_of_the_example_imports_moe_peft():
    assert "```python\nimport moe_peft\n" in section(FACTS)
    assert "KeyError: 'LORAMOE'" in section(FACTS) and "moe-peft run" in section(FACTS)
    assert "AutoModelForSequenceClassification.from_pretrained" in section(
        dataclasses.replace(FACTS, task_type="SEQ_CLS")
    )


def test_results_and_settings_are_tables_and_absent_without_values():
    settings = {"r": 4, "target_modules": ["k_proj", "v_proj"], "layers_pattern": "a|b"}
    text = section(dataclasses.replace(FACTS, settings=settings, metrics={"eval_loss": 1 / 3}, num_parameters=12345))
    for row in (
        "| r | 4 |",
        "| target_modules | k_proj, v_proj |",
        "| layers_pattern | a\\|b |",
        "| parameters of the adapter | 12,345 |",
        "| eval_loss | 0.333333 |",
    ):
        assert row in text.splitlines()
    assert "### Parameters" not in section(FACTS) and "### Results" not in section(FACTS)


def test_the_card_of_a_saved_model_names_its_method_and_settings(tmp_path):
    model = get_peft_model(tiny_llama(), LoraMoeConfig(task_type="CAUSAL_LM", num_experts=3, r=2))
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.count(BEGIN) == text.count(END) == 1
    assert LoraMoeConfig.equation in text and "[arXiv 2312.09979](https://arxiv.org/abs/2312.09979)" in text
    assert "| num_experts | 3 |" in text and "| r | 2 |" in text and "| router |" not in text
    # What peft writes into every file is no setting of the method.
    assert not any(f"\n| {name} |" in text for name in ("peft_type", "peft_version", "task_type", "inference_mode"))


def test_a_card_shows_what_its_method_uses_and_nothing_else():
    whole = section(EsftConfig(experts={"1": [26, 8], "2": [5]}).facts())
    assert "| experts | 1: 8, 26; 2: 5 |" in whole and "| expert_adapter | full |" in whole
    assert not any(f"| {name} |" in whole for name in ("r", "lora_alpha", "num_experts", "router"))
    assert "| r | 4 |" in section(EsftConfig(experts={"1": [8]}, expert_adapter="lora").facts())
    routed = section(PerftConfig(num_experts=8, top_k=2).facts())
    assert "| variant | R |" in routed and "| top_k | 2 |" in routed and "| activation |" not in routed
    assert "| activation | silu |" in section(PerftConfig(experts="bottleneck").facts())
    vectors = section(MovConfig().facts())
    assert "| router_granularity | head |" in vectors and "| r |" not in vectors
