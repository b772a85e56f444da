"""What a card becomes on its way to the Hub: peft's library name, a base model the Hub can link, no stock example."""

from __future__ import annotations

import dataclasses

import pytest
from huggingface_hub import ModelCard, ModelCardData
from trl.trainer.utils import generate_model_card

from moe_peft.config.card_section import AdapterFacts, section
from moe_peft.hub.card import add_results, hub_card, is_hub_name, read_card

FACTS = AdapterFacts("SiRA", "SIRA", "y = ...", "arXiv 2311.09179", "CAUSAL_LM", base_model="org/base", name="me/a")


def completed(text: str, facts: AdapterFacts = FACTS) -> ModelCard:
    return ModelCard(hub_card(ModelCard(text), facts))


def trl_card(base_model: str | None) -> str:
    card = generate_model_card(
        base_model=base_model,
        model_name="a",
        hub_model_id="me/a",
        dataset_name="org/data",
        tags=["sft", "trl"],
        wandb_url=None,
        trackio_url=None,
        trainer_name="SFT",
    )
    return str(card)


def test_metadata_links_the_adapter_to_peft_and_its_base_model():
    data = completed("---\nlibrary_name: transformers\ntags: [mine, 'base_model:adapter:/old']\n---\n").data
    assert data.to_dict() == {
        "library_name": "peft",
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:org/base", "mine", "moe-peft", "peft", "sira"],
    }


def test_what_the_user_put_into_the_metadata_stays():
    text = "---\nlicense: mit\nlanguage: en\npipeline_tag: translation\ndatasets: [org/data]\n---\n"
    data = completed(text).data
    assert (data.license, data.language, data.pipeline_tag) == ("mit", "en", "translation")
    assert data.datasets == ["org/data"]


@pytest.mark.parametrize("base_model", ["/data/models/base", "./base", "here", None])
def test_a_base_model_outside_the_hub_is_left_out_of_metadata_and_example(base_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    text = f"---\nbase_model: {base_model}\ntags: ['base_model:adapter:{base_model}']\ndatasets: [./here]\n---\n"
    card = completed(text, dataclasses.replace(FACTS, base_model=base_model))
    assert not {"base_model", "base_model_relation", "datasets"} & card.data.to_dict().keys()
    assert card.data.tags == ["moe-peft", "peft", "sira"]
    assert 'from_pretrained("path/or/name-of-the-base-model")' in card.text


def test_trls_example_gives_way_to_ours_and_the_rest_of_its_card_stays():
    card = completed(trl_card("org/base"))
    assert "pipeline(" not in card.text and "Quick start" not in card.text
    assert card.text.index("# Model Card for a") < card.text.index("import moe_peft")
    assert card.text.index("import moe_peft") < card.text.index("## Training procedure")
    assert "[org/base](https://huggingface.co/org/base)" in card.text and "Cite TRL as" in card.text
    assert {"trl", "sft", "generated_from_trainer"} <= set(card.data.tags)
    assert card.data.library_name == "peft" and "licence" not in card.data
    assert completed(str(card)).content == card.content


def test_trls_card_of_a_local_base_links_to_nothing():
    card = completed(trl_card(None), dataclasses.replace(FACTS, base_model="/data/base"))
    assert "None" not in card.text and "fine-tuned version of a model outside the Hub" in card.text


def test_the_form_nobody_filled_in_is_dropped_and_one_with_an_answer_stays():
    form = str(ModelCard.from_template(ModelCardData()))
    assert completed(form).text.startswith("# a\n\n") and "More Information Needed" not in completed(form).text
    edited = form.replace("## Uses", "## Uses\n\nFor poems.")
    assert "For poems." in completed(edited).text and "More Information Needed" in completed(edited).text


def test_our_section_is_written_anew_where_it_is():
    card = completed(
        f"---\n{{}}\n---\nAbove.\n\n{section(FACTS)}\n\nBelow.\n", dataclasses.replace(FACTS, metrics={"x": 1})
    )
    assert card.text.startswith("Above.") and card.text.rstrip().endswith("Below.")
    assert card.text.count("import moe_peft\n") == 1 and "| x | 1 |" in card.text


def test_metadata_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "README.md").write_text("---\ntags: [a\n---\n")
    with pytest.raises(ValueError, match=r"README\.md cannot be read .*Correct the lines"):
        read_card(tmp_path / "README.md")


def test_a_missing_card_and_one_without_metadata_are_empty_and_kept(tmp_path):
    assert read_card(tmp_path / "README.md").text.strip() == ""
    (tmp_path / "README.md").write_text("My words.\n")
    assert "My words." in hub_card(read_card(tmp_path / "README.md"), FACTS)


def test_names_and_paths_are_told_apart(tmp_path):
    assert is_hub_name("gpt2") and is_hub_name("org/name")
    assert not any(map(is_hub_name, (None, "", str(tmp_path), "/no/such/folder", "a/b/c", "../base", "~/base")))


def test_results_of_an_evaluation_stand_in_the_metadata_with_task_data_and_split():
    card = ModelCard(hub_card(ModelCard("---\n{}\n---\n"), FACTS))
    metrics = {"eval_loss": 1.25, "eval_accuracy": 0.5, "train_loss": 2.0, "eval_broken": float("nan")}
    add_results(card, "a", metrics, "chats.jsonl", "test")
    add_results(card, "a", {"eval_loss": 1.0}, "chats.jsonl", "test")  # of a longer run
    add_results(card, "a", {"eval_loss": 3.0}, "org/data", "validation")
    read = ModelCard(str(card))
    found = {(r.dataset_name, r.dataset_split, r.metric_type): r for r in read.data.eval_results}
    assert {key: own.metric_value for key, own in found.items()} == {
        ("chats.jsonl", "test", "loss"): 1.0,
        ("chats.jsonl", "test", "accuracy"): 0.5,
        ("org/data", "validation", "loss"): 3.0,
    }
    assert {own.task_type for own in found.values()} == {"text-generation"}
    assert found["org/data", "validation", "loss"].dataset_type == "org/data"
    assert found["chats.jsonl", "test", "loss"].dataset_type == "custom" and read.data.model_name == "a"
    again = ModelCard(hub_card(read, FACTS))
    assert len(again.data.eval_results) == 3  # a push keeps them


def test_rates_groups_and_the_plot_stand_in_the_section():
    facts = dataclasses.replace(FACTS, training={"learning_rate": "0.0002", "router_lr": "0.001"}, plot="routing.png")
    text = section(dataclasses.replace(facts, settings={"expert_groups": [0, 1], "group_column": "task"}))
    for part in ("| router_lr | 0.001 |", "| expert_groups | 0, 1 |", "| group_column | task |", "](routing.png)"):
        assert part in text
