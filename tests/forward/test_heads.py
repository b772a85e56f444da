"""Places outside the backbone, heads: the pass of the whole model's call serves them."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from moe_peft import LoraMoeConfig, MoloraConfig, RoutedConfig, SiraConfig, router_loss
from moe_peft.forward.tracker import find_tracker
from moe_peft.layers import RoutedLayer
from moe_peft.telemetry.functions import record
from tests import reference
from tests.adapter_types import ALL
from tests.compare import as_lists
from tests.tiny import FFN, HIDDEN, LAYERS, VOCAB, padded_batch, tiny_gpt2, tiny_llama, tiny_t5

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
BASES = {
    "llama": (tiny_llama, ["lm_head", "up_proj"]),
    "gpt2": (tiny_gpt2, ["lm_head", "c_fc"]),
    "t5": (tiny_t5, ["lm_head", "wi_0"]),
    "bert-mlm": (lambda: BertForMaskedLM(BertConfig(**SIZES)), "all-linear"),
    "roberta": (lambda: RobertaForSequenceClassification(RobertaConfig(**SIZES)), ["query", "classifier.dense"]),
    "electra": (
        lambda: ElectraForSequenceClassification(ElectraConfig(embedding_size=32, **SIZES)),
        ["query", "classifier.dense"],
    ),
    "distilbert": (
        lambda: DistilBertForSequenceClassification(
            DistilBertConfig(
                vocab_size=VOCAB, dim=32, n_layers=2, n_heads=4, hidden_dim=64, dropout=0.0, seq_classif_dropout=0.0
            )
        ),
        ["q_lin", "pre_classifier"],
    ),
}


def adapted(name, **fields):
    make, targets = BASES[name]
    torch.manual_seed(0)
    kept = {"num_experts": 4, "top_k": 2, "r": 2, "init_weights": False, "lora_dropout": 0.0, **fields}
    return get_peft_model(make(), RoutedConfig(target_modules=targets, **kept)).double().train()


def batch_of(name):
    batch = padded_batch([6, 3, 5])
    classifies = name in ("roberta", "electra", "distilbert")
    batch["labels"] = torch.tensor([0, 1, 0]) if classifies else batch["input_ids"]
    return batch


@pytest.mark.parametrize("name", BASES)
def test_every_place_has_a_router_loss_and_its_gradient(name):
    fields = {"router_aux_loss_coef": 0.0, "losses": {"z_loss": 1.0}}
    model, batch = adapted(name, **fields), batch_of(name)
    loss = model(**batch).loss
    places = {module.place for module in model.modules() if isinstance(module, RoutedLayer)}
    assert {place for place, _ in find_tracker(model).latest.layers} == places
    value = router_loss(model).detach()
    loss.backward()
    plain = adapted(name, router_aux_loss_coef=0.0)
    with record(plain) as routings:
        loss = plain(**batch).loss
    expected = sum(
        reference.z_loss(as_lists(made[0].logits), None if made[0].valid is None else made[0].valid.tolist())
        for made in routings.values()
    )
    torch.testing.assert_close(value, expected.detach(), rtol=1e-6, atol=0)
    (loss + expected).backward()
    wanted = dict(plain.named_parameters())
    for parameter_name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, wanted[parameter_name].grad, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-mlm"])
def test_a_head_sees_the_mask_of_the_tokens_it_reads(name):
    model, batch = adapted(name), batch_of(name)
    with record(model) as routings:
        model(**batch)
    valid = batch["attention_mask"].reshape(-1).bool()
    heads = [place for place in routings if "layers" not in place and "layer." not in place and "h." not in place]
    assert heads and all(torch.equal(routings[place][0].valid, valid) for place in heads)


def test_the_head_of_an_encoder_decoder_reads_the_decoders_tokens():
    model, batch = adapted("t5"), padded_batch([6, 3])
    target = padded_batch([2, 4], seed=2)
    with record(model) as routings:
        model(**batch, decoder_input_ids=target["input_ids"], decoder_attention_mask=target["attention_mask"])
    assert torch.equal(routings["lm_head"][0].valid, target["attention_mask"].reshape(-1).bool())


def test_pooled_rows_have_one_sequence_and_group_each():
    config = LoraMoeConfig(num_experts=4, expert_groups=[0, 0, 1, 1], target_modules=["classifier.dense"], r=2)
    model = get_peft_model(BASES["roberta"][0](), config).train()
    with record(model) as routings:
        model(**padded_batch([6, 4, 5]), task_type=torch.tensor([0, 1, 1]))
    context = routings["classifier.dense"][0].context
    assert context.training and context.num_sequences == 3 and context.groups.tolist() == [0, 1, 1]


def test_capacity_and_expert_dropout_act_at_a_head():
    config = SiraConfig(num_experts=4, top_k=2, capacity_factor=0.25, target_modules=["lm_head"], r=2)
    model = get_peft_model(tiny_llama(), config).train()
    with record(model) as routings:
        model(**padded_batch([6, 4]))
        model.eval()(**padded_batch([6, 4]))
    trained, evaluated = routings["lm_head"]
    assert trained.dropped.any() and (trained.probs == 0).any()
    assert evaluated.dropped is None and (evaluated.probs > 0).all()


@pytest.mark.parametrize("config_cls", ALL, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize(("name", "head"), [("llama", "lm_head"), ("roberta", "classifier.dense")])
def test_every_adapter_type_serves_a_head_or_refuses_it_by_name(config_cls, name, head):
    model, config = BASES[name][0](), config_cls(target_modules=[head])
    if config.placement not in ("linear", "scaled"):
        with pytest.raises((ValueError, TypeError), match=f"{head}|{type(model).__name__}"):
            get_peft_model(model, config)
        assert not any(isinstance(module, RoutedLayer) for module in model.modules())
        return
    model = get_peft_model(model, config).train()
    (layer,) = (module for module in model.modules() if isinstance(module, RoutedLayer))
    batch = {**batch_of(name), "task_type": torch.tensor([0, 1, 0])}
    loss = model(**batch).loss
    value = router_loss(model)
    assert layer.place == head and (value.item() > 0) == bool(layer.objectives["default"].losses)
    loss.backward()
    # B is zero at the start, so that what reaches a router is its loss alone.
    gradients = [p.grad for p in layer.router["default"].parameters() if p.grad is not None]
    assert any(gradient.any() for gradient in gradients) == (value.item() > 0)


@pytest.mark.parametrize(
    ("name", "output"), [("llama", "lm_head"), ("bert-mlm", "decoder"), ("roberta", "out_proj"), ("t5", "lm_head")]
)
def test_all_linear_leaves_output_layers_out(name, output):
    model = get_peft_model(BASES[name][0](), MoloraConfig(target_modules="all-linear", num_experts=2, r=1))
    places = [module.place for module in model.modules() if isinstance(module, RoutedLayer)]
    assert places and not any(place.endswith(output) for place in places)
