"""A mixture whose scale nobody gives learns at LoRA's pace, and files keep the scale that they were saved with."""

from __future__ import annotations

import copy
import json
import math
from itertools import islice

import make_backbone
import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_peft import RoutedConfig, SiraConfig
from moe_peft.routers import GATES, SCORERS, SELECTORS

FFN = ["gate_proj", "up_proj", "down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def two_digits(value):
    return float(f"{value:.2g}")


@pytest.mark.parametrize(
    "fields", [{"router": "constant"}, {"num_experts": 1}, {"num_experts": 1, "router": "dense"}, {"wraps": "experts"}]
)
def test_where_weights_are_one_or_the_backbones_the_scale_is_loras(fields):
    if "wraps" in fields:
        fields |= {"router": "backbone", "router_aux_loss_coef": 0.0}
    assert RoutedConfig(r=6, **fields).lora_alpha == 12


@pytest.mark.parametrize(("experts", "k"), [(8, 2), (64, 4), (5, 5)])
def test_even_weights_have_the_closed_form(experts, k):
    """q = 1 / sqrt(k E) and m = 1 for weights that sum to one; a table of tasks starts even."""
    even = {"scorer": "task_table", "num_experts": experts, "top_k": k, "norm_topk_prob": True}
    scale = 2 * math.sqrt(k * experts) ** (2 / 3) * experts ** (1 / 3)
    assert RoutedConfig(r=3, **even).lora_alpha == two_digits(3 * scale)


def test_a_scale_that_is_given_or_saved_stays_and_one_that_follows_is_saved(tmp_path):
    assert RoutedConfig(lora_alpha=8).lora_alpha == 8 and SiraConfig(lora_alpha=8).lora_alpha == 8
    for cls in (RoutedConfig, SiraConfig):
        config = cls(task_type="CAUSAL_LM")
        config.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "adapter_config.json").read_text())
        assert saved["lora_alpha"] == config.lora_alpha > 8
        assert PeftConfig.from_pretrained(tmp_path).meaning() == config.meaning()
        saved["lora_alpha"] = 8
        (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
        assert PeftConfig.from_pretrained(tmp_path).lora_alpha == 8


def test_the_scale_follows_from_nothing_but_the_fields():
    state, wanted = torch.get_rng_state(), RoutedConfig().lora_alpha
    assert torch.equal(torch.get_rng_state(), state)
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
        assert RoutedConfig().lora_alpha == wanted
    assert RoutedConfig(routed_scaling_factor=3.0).lora_alpha == wanted
    assert RoutedConfig(r=8).lora_alpha == pytest.approx(2 * wanted, rel=0.05)


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize(("router", "gate"), [*((name, "softmax") for name in SELECTORS), ("top_k", "sigmoid")])
def test_every_router_has_a_scale(scorer, router, gate):
    assert gate in GATES
    fields = {"scorer": scorer, "router": router, "gate": gate, "router_aux_loss_coef": 0.0, "num_experts": 4}
    try:
        config = RoutedConfig(**fields)
    except ValueError as error:
        assert "must be one that needs no" in str(error)
        return
    assert 0.5 < config.scaling < 100


@pytest.mark.parametrize("experts", [2**12, 2**20])
def test_many_experts_have_a_scale_in_range(experts):
    assert 1 < RoutedConfig(num_experts=experts).scaling <= 1e6


def test_kinds_without_a_scale_keep_what_files_hold_of_them():
    assert RoutedConfig(experts="bottleneck").lora_alpha == RoutedConfig(experts="bottleneck", lora_alpha=8).lora_alpha


PACED = {
    "top 2 of 8": (RoutedConfig, {}),
    "top 2 of 8, weights that sum to one": (RoutedConfig, {"norm_topk_prob": True}),
    "dense, 8": (RoutedConfig, {"router": "dense"}),
    "top 1 of 4": (RoutedConfig, {"num_experts": 4, "top_k": 1, "r": 8}),
    "SiRA": (SiraConfig, {"num_experts": 16, "r": 2}),
}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A backbone, batches to train on, and batches that are held out."""
    folder = tmp_path_factory.mktemp("pretrained")
    settings = make_backbone.BackboneSettings(num_steps=150)
    make_backbone.make_backbone(folder / "backbone", folder / "data", settings=settings)
    tokenizer = AutoTokenizer.from_pretrained(folder / "backbone")
    train = batches(folder / "data/instructions/train.jsonl", tokenizer, 60)
    test = batches(folder / "data/instructions/test.jsonl", tokenizer, 12)
    return AutoModelForCausalLM.from_pretrained(folder / "backbone"), train, test


def batches(path, tokenizer, count, rows=8):
    with open(path) as lines:
        texts = [json.loads(line) for line in islice(lines, 0, 7 * rows * count, 7)]
    texts = [row["prompt"] + row["completion"] for row in texts]
    made = [tokenizer(texts[i : i + rows], return_tensors="pt", padding=True) for i in range(0, len(texts), rows)]
    for batch in made:
        batch.pop("token_type_ids", None)
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return made


@torch.no_grad()
def held_out(model, rows):
    return sum(model.eval()(**batch).loss.item() for batch in rows) / len(rows)


def gain(config, base, train, test):
    """How much 60 steps of AdamW at 2e-4, falling to zero, lower the held-out loss."""
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(base), config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
    for step, batch in enumerate(train):
        optimizer.param_groups[0]["lr"] = 2e-4 * (1 - step / len(train))
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return held_out(base, test) - held_out(model, test)


@pytest.mark.slow
def test_the_gain_of_sixty_steps_is_that_of_lora_of_equal_size(pretrained):
    loras = {}
    for name, (cls, fields) in PACED.items():
        targets = ATTENTION if cls is SiraConfig else FFN
        config = cls(task_type="CAUSAL_LM", target_modules=targets, **fields)
        rank = config.num_experts * config.r
        key = (rank, len(targets))
        if key not in loras:
            lora = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=targets)
            loras[key] = gain(lora, *pretrained)
        pace = gain(config, *pretrained) / loras[key]
        assert 0.8 <= pace <= 1.7, (name, pace)
        assert loras[key] > 0.05
