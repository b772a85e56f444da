"""Stock LoRA and the training of every weight run in every script, with a dry run, a rate and a card of their own."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from baselines import BASELINES, NoAdapter, PlainLora, describe
from peft import LoraConfig, PeftModel, get_peft_model
from rates import default_rate
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import moe_peft
from moe_peft.cli import main
from tests.tiny import tiny_llama
from tests.train.tiny_run import logits, make_base, make_data, run_here, words, write_run

TEXTS = [{"text": words(i, 5)} for i in range(6)]
PAIRS = [{"prompt": words(i, 3), "chosen": words(20 + i, 3), "rejected": words(40 + i, 3)} for i in range(6)]
MARKED = [{"prompt": words(i, 3), "completion": words(20 + i, 3), "label": bool(i % 2)} for i in range(6)]
PROMPTS = [{"prompt": words(i, 3)} for i in range(6)]
REWARDED = {"reward_funcs": ["get_soft_overlong_punishment"], "num_generations": 2, "max_completion_length": 4}
ROWS = {"sft": TEXTS, "dpo": PAIRS, "reward": PAIRS, "kto": MARKED, "grpo": PROMPTS, "rloo": PROMPTS}
ADAPTER = dict.fromkeys(("moe_num_experts", "moe_r", "moe_router_aux_loss_coef"))


def trained(folder, script, method, **values):
    base, data = make_base(folder / "base"), make_data(folder / "data", ROWS[script])
    more = REWARDED if script in ("grpo", "rloo") else {}
    values = {**ADAPTER, **more, "moe_method": method, "max_steps": 2, "save_strategy": "no", **values}
    return run_here(script, write_run(folder, model_name_or_path=base, dataset_name=data, **values))


def test_lora_is_stock_lora_from_the_dry_run_to_the_card(tmp_path, capsys):
    trainer = trained(tmp_path, "sft", "lora", moe_r=3, moe_lora_dropout=0.0, learning_rate=None)
    printed = capsys.readouterr().out
    own = trainer.model.peft_config["default"]
    assert type(own) is LoraConfig and (own.r, own.lora_alpha) == (3, 6)
    count = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert f"LoRA: rank 3; 14 places, {count:,} trainable parameters" in printed
    assert "learning rate: 0.0002, the default of LoRA for sft" in printed
    assert "AutoPeftModelForCausalLM" in printed and "import moe_peft" not in printed
    saved = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert saved["peft_type"] == "LORA"
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "out")
    assert torch.equal(logits(again), logits(trainer.model))
    card = (tmp_path / "out/README.md").read_text()
    assert "moe_peft" not in card and "[More Information Needed]" not in card
    assert "| r | 3 |" in card and "| train_loss |" in card and "arxiv.org/abs/2106.09685" in card


def test_none_trains_every_weight_and_saves_the_model(tmp_path, capsys):
    trainer = trained(tmp_path, "sft", "none", learning_rate=None)
    printed = capsys.readouterr().out
    assert all(p.requires_grad for p in trainer.model.parameters())
    assert "learning rate: 2e-05, the default of Full fine-tuning for sft" in printed
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(trainer.model)) and "The model is in" in printed
    assert "[More Information Needed]" not in (tmp_path / "out/README.md").read_text()
    trained(tmp_path / "again", "sft", "none", output_dir=str(tmp_path / "out"))
    assert (tmp_path / "out/previous-1/model.safetensors").is_file()


@pytest.mark.parametrize("method", BASELINES)
@pytest.mark.parametrize(
    "script",
    ["reward", *(pytest.param(name, marks=pytest.mark.slow) for name in ROWS if name not in ("sft", "reward"))],
)
def test_every_script_trains_the_baselines(script, method, tmp_path):
    trainer = trained(tmp_path, script, method)
    assert trainer.state.global_step == 2
    if script == "reward" and method == "none":
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=1)


PLACED = [{}, {"target_modules": ["q_proj"], "r": 5}, {"target_modules": ["q_proj"], "layers_to_transform": [1]}]


@pytest.mark.parametrize("values", PLACED)
def test_the_dry_run_counts_what_peft_trains_and_leaves_the_model_alone(values):
    with torch.device("meta"):
        model = tiny_llama()
    before = [name for name, _ in model.named_modules()]
    config = PlainLora(task_type="CAUSAL_LM", **values)
    found = describe(model, config)
    assert [name for name, _ in model.named_modules()] == before
    adapted = get_peft_model(tiny_llama(), config.adapter())
    assert found.num_parameters == adapted.get_nb_trainable_parameters()[0] == sum(found.parameters)
    assert all(place.name in str(found) for place in found.places)
    assert describe(model, NoAdapter()).num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"moe_router_lr": 0.1}, "--moe_router_lr 0.1 has no meaning for --moe_method lora"),
        ({"moe_num_experts": 4}, "moe_num_experts has no meaning for moe_method lora"),
        ({"moe_r": 0}, "PlainLora: r=0 must be a rank of at least 1"),
        ({"moe_target_modules": ["down_prj"]}, "down_prj"),
        ({"moe_method": "none", "load_in_4bit": True}, "--load_in_4bit true packs the weights"),
        ({"moe_method": "none", "moe_report": True}, "--moe_report true loads the saved adapter again"),
    ],
)
def test_what_a_baseline_cannot_do_is_refused_before_a_model_is_loaded(values, message, tmp_path):
    make_base(tmp_path / "base")
    (tmp_path / "base/model.safetensors").unlink()
    data = make_data(tmp_path / "data", TEXTS)
    run = {**ADAPTER, "moe_method": "lora", "model_name_or_path": str(tmp_path / "base"), "dataset_name": data}
    with pytest.raises(ValueError, match=message):
        run_here("sft", write_run(tmp_path, **{**run, **values}))


def test_baselines_have_names_that_no_adapter_type_has_and_rates():
    assert not BASELINES.keys() & moe_peft.methods.METHODS.keys()
    assert [default_rate(own(), "sft") for own in BASELINES.values()] == [2e-4, 2e-5]
    NoAdapter().check_loading(SimpleNamespace(load_in_4bit=False))


def test_the_memory_of_stock_lora_is_described_too(tmp_path, capsys):
    base = make_base(tmp_path / "base")
    assert main(["describe", "--model", base, "--moe_method", "lora", "--moe_r", "2", "--max_length", "16"]) == 0
    assert "LoRA: rank 2; 14 places" in capsys.readouterr().out
    assert main(["describe", "--model", base, "--moe_method", "none"]) == 1
    assert "has no adapter to describe" in capsys.readouterr().err
