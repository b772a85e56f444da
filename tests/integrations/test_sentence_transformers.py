"""SentenceTransformer trains routed adapters as any model does: losses, logs, files, however they were added."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import BertModel, TrainerCallback, set_seed

from moe_peft import RoutedConfig, attach
from moe_peft.forward.tracker import find_tracker
from moe_peft.integrations.checks import check_adapter
from tests.contract.cases import randomize
from tests.integrations.test_attach import STATISTICS
from tests.integrations.trainers import tokenizer, words
from tests.tiny import tiny_bert

pytest.importorskip("sentence_transformers")

from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

BATCH = 4


@pytest.fixture
def backbone(tmp_path):
    """A folder with a tiny BERT and its tokenizer."""
    set_seed(0)
    BertModel(tiny_bert().config).save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


def bare(backbone):
    """A SentenceTransformer without an adapter."""
    transformer = Transformer(backbone)
    pooling = Pooling(transformer.get_embedding_dimension(), "mean")
    return SentenceTransformer(modules=[transformer, pooling], device="cpu")


def sentences(backbone, way="transformers", coef=0.5):
    """A SentenceTransformer with an adapter, added by transformers or by peft."""
    model = bare(backbone)
    fields = {"num_experts": 4, "top_k": 2, "r": 2, "router_aux_loss_coef": coef}
    fields["target_modules"] = ["query", "intermediate.dense"]
    config = RoutedConfig(task_type="FEATURE_EXTRACTION", **fields)
    if way == "transformers":
        model.add_adapter(config)
    else:
        model[0].model = get_peft_model(model[0].model, config)
    randomize(model)
    return model


def pairs(count=8):
    rows = [{"anchor": words(row, 4), "positive": words(row, 3 + row % 3, 1)} for row in range(count)]
    return Dataset.from_list(rows)


def trainer_of(folder, model, loss=MultipleNegativesRankingLoss, **fields):
    settings = {
        "output_dir": str(folder / "run"),
        "max_steps": 2,
        "per_device_train_batch_size": BATCH,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **fields,
    }
    args = SentenceTransformerTrainingArguments(**settings)
    return SentenceTransformerTrainer(model=model, args=args, train_dataset=pairs(), loss=loss(model))


def gradient(folder, model, loss=MultipleNegativesRankingLoss, accumulation=1):
    """Gradient of the routers in the first step of a trainer."""
    found = {}
    fields = {"per_device_train_batch_size": BATCH // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = trainer_of(folder, model, loss, max_steps=1, learning_rate=0.0, max_grad_norm=0.0, **fields)

    class Read(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            found.update({n: p.grad.clone() for n, p in model.named_parameters() if "_router." in n})

    trainer.add_callback(Read())
    attach(trainer).train()
    return found


@pytest.mark.parametrize("way", ["transformers", "peft"])
def test_it_trains_logs_the_routing_and_saves(way, backbone, tmp_path):
    model = sentences(backbone, way)
    check_adapter(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = attach(trainer_of(tmp_path, model, learning_rate=1e-2))
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2
    for entry in entries:
        assert {f"moe/{name}" for name in STATISTICS} <= entry.keys()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    assert find_tracker(model).loss_scale == 1.0 and not find_tracker(model).managed
    model.save(str(tmp_path / "saved"))
    if way == "transformers":
        again = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
        expected = model.encode(["w3 w4", "w7"])
        assert torch.equal(torch.tensor(again.encode(["w3 w4", "w7"])), torch.tensor(expected))


@pytest.mark.parametrize("loss", [MultipleNegativesRankingLoss, CachedMultipleNegativesRankingLoss])
@pytest.mark.parametrize("way", ["transformers", "peft"])
def test_router_losses_are_in_the_gradient(way, loss, backbone, tmp_path):
    """Twice the coefficient is twice the router losses' part of the gradient, which is not zero."""
    parts = [gradient(tmp_path, sentences(backbone, way, coef), loss) for coef in (0.0, 0.5, 1.0)]
    for name, task in parts[0].items():
        once, twice = parts[1][name] - task, parts[2][name] - task
        assert once.abs().max() > 1e-6
        torch.testing.assert_close(twice, 2 * once, rtol=1e-3, atol=1e-6)


def test_a_model_without_an_adapter_is_refused(backbone, tmp_path):
    with pytest.raises(ValueError, match="SentenceTransformer has no routed adapter"):
        attach(trainer_of(tmp_path, bare(backbone)))
