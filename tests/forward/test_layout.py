"""Stacks that compute with positions first have the masks, samples and losses of their rows all the same."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import (
    FSMTConfig,
    FSMTForConditionalGeneration,
    LongformerConfig,
    LongformerForMaskedLM,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from moe_peft import LoraMoeConfig, RoutedConfig, SiraConfig, router_loss
from moe_peft.forward.layout import turned_shape
from moe_peft.telemetry.functions import record
from tests.tiny import tiny_llama

SHARED = {"num_experts": 4, "r": 2, "init_weights": False, "lora_dropout": 0.0}


def xlnet():
    config = XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48, dropout=0.0, num_labels=2)
    return XLNetForSequenceClassification(config), ["layer_1", "layer_2", "summary"]


def fsmt():
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
    vocabulary = {"langs": ["en", "de"], "src_vocab_size": 64, "tgt_vocab_size": 64}
    config = FSMTConfig(d_model=32, dropout=0.0, attention_dropout=0.0, **sizes, **heads, **vocabulary)
    return FSMTForConditionalGeneration(config), ["fc1", "k_proj"]


def longformer():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 1}
    config = LongformerConfig(vocab_size=64, attention_window=4, max_position_embeddings=64, **sizes, **dropout)
    return LongformerForMaskedLM(config), ["query", "intermediate.dense"]


def batch_of(lengths, width):
    ids = torch.randint(3, 64, (len(lengths), width), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask + (1 - mask), "attention_mask": mask}


@pytest.mark.parametrize(
    ("lengths", "width"), [((8, 3, 5), 8), ((4, 2, 3, 1), 4)], ids=["", "as many rows as positions"]
)
@pytest.mark.parametrize("build", [xlnet, fsmt])
def test_padding_does_not_count(build, lengths, width):
    torch.manual_seed(0)
    base, targets = build()
    config = RoutedConfig(target_modules=targets, router_aux_loss_coef=0.5, **SHARED)
    model, batch = get_peft_model(base, config).train(), batch_of(lengths, width)
    with record(model) as routings:
        model(**batch)
    for place, (routing, *others) in routings.items():
        assert not others
        if "summary" in place:
            assert routing.weights.shape[0] == len(lengths) and routing.valid is None
        elif "decoder" not in place or "encoder_attn" in place:
            expected = batch["attention_mask"].bool().T.reshape(-1)
            assert torch.equal(routing.valid, expected), place
    assert any("encoder_attn.k_proj" in place for place in routings) == (build is fsmt)


def test_the_positions_of_attention_alone_may_come_first():
    torch.manual_seed(0)
    base, targets = longformer()
    model = get_peft_model(base, RoutedConfig(target_modules=targets, **SHARED)).train()
    batch = batch_of((8, 3, 5), 8)
    with record(model) as routings:
        model(**batch)
    mask = batch["attention_mask"].bool()
    (query,) = routings["longformer.encoder.layer.0.attention.self.query"]
    (inner,) = routings["longformer.encoder.layer.0.intermediate.dense"]
    assert torch.equal(query.valid, mask.T.reshape(-1)) and torch.equal(inner.valid, mask.reshape(-1))


@pytest.mark.parametrize(
    "config",
    [
        lambda **kw: LoraMoeConfig(expert_groups=[0, 0, 1, 1], router_aux_loss_coef=1.0, **kw),
        lambda **kw: SiraConfig(top_k=2, expert_dropout=0.0, capacity_factor=1.0, **kw),
        lambda **kw: RoutedConfig(router_aux_loss_coef=1.0, router_z_loss_coef=0.1, **kw),
    ],
    ids=["groups of samples", "capacity of sequences", "tokens"],
)
def test_each_row_is_a_sample_whose_longer_neighbours_change_nothing(config):
    values = []
    for lengths, width in (((5, 3), 5), ((5, 3), 9)):
        torch.manual_seed(0)
        base, _ = xlnet()
        model = get_peft_model(base, config(target_modules=["layer_1"], **SHARED)).double().train()
        batch = batch_of(lengths, 5)
        padded = {name: torch.nn.functional.pad(value, (0, width - 5)) for name, value in batch.items()}
        groups = {"task_type": torch.tensor([0, 1])} if isinstance(model.peft_config["default"], LoraMoeConfig) else {}
        # XLNet reads no mask where every position may see all others; rows of padding come last.
        model(**padded, **groups)
        values.append(router_loss(model).detach())
    torch.testing.assert_close(values[1], values[0])


@pytest.mark.parametrize("build", [xlnet, fsmt, longformer])
@pytest.mark.parametrize(("rows", "width"), [(2, 8), (4, 4), (4, 8), (4, 1)])
def test_each_row_has_the_adapter_that_it_names(build, rows, width):
    torch.manual_seed(0)
    base, targets = build()
    model = get_peft_model(base, RoutedConfig(target_modules=targets, **SHARED))
    model.add_adapter("other", RoutedConfig(target_modules=targets, **SHARED))
    model, batch = model.eval(), batch_of((width,) * rows, width)
    expected = {}
    with torch.no_grad():
        for name in ("default", "other"):
            model.set_adapter(name)
            expected[name] = model(**batch).logits
        with model.disable_adapter():
            expected["__base__"] = model(**batch).logits
        names = ["other", "__base__", "default", "other"][:rows]
        found = model(**batch, adapter_names=names).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(found[row], expected[name][row], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected["other"], expected["default"])


@pytest.mark.parametrize(("rows", "width"), [(2, 8), (4, 4)])
def test_each_row_has_the_adapter_that_it_names_in_blocks(rows, width):
    torch.manual_seed(0)
    base, _ = xlnet()
    fields = {"wraps": "block", "target_modules": ["ff"], **SHARED}
    model = get_peft_model(base, RoutedConfig(**fields))
    model.add_adapter("other", RoutedConfig(**fields))
    model, batch = model.eval(), batch_of((width,) * rows, width)
    names, expected = ["other", "default", "__base__", "other"][:rows], {}
    with torch.no_grad():
        for name in ("default", "other"):
            model.set_adapter(name)
            expected[name] = model(**batch).logits
        with model.disable_adapter():
            expected["__base__"] = model(**batch).logits
        found = model(**batch, adapter_names=names).logits
    assert not torch.allclose(expected["other"], expected["default"])
    for row, name in enumerate(names):
        torch.testing.assert_close(found[row], expected[name][row], rtol=1e-4, atol=1e-5)


def test_attention_that_turns_its_input_is_told_from_the_stack_where_rows_are_as_many_as_positions():
    torch.manual_seed(0)
    base, targets = longformer()
    model = get_peft_model(base, RoutedConfig(target_modules=targets, **SHARED)).train()
    batch = batch_of((4, 1, 2, 3), 4)
    with record(model) as routings:
        model(**batch)
    mask = batch["attention_mask"].bool()
    (query,) = routings["longformer.encoder.layer.0.attention.self.query"]
    (inner,) = routings["longformer.encoder.layer.0.intermediate.dense"]
    assert torch.equal(query.valid, mask.T.reshape(-1)) and torch.equal(inner.valid, mask.reshape(-1))


@pytest.mark.parametrize(
    ("leading", "shape", "expected"),
    [
        ((8, 3), (3, 8), True),
        ((3, 8), (3, 8), False),
        ((3, 3), (3, 3), False),
        ((1, 3), (3, 1), False),
        ((8, 3), None, False),
    ],
)
def test_shapes_tell_where_rows_and_positions_differ(leading, shape, expected):
    assert turned_shape(leading, shape, None) is expected


def test_as_many_rows_as_positions_compile_to_one_graph():
    config = RoutedConfig(target_modules=["up_proj"], **SHARED)
    model, batch = get_peft_model(tiny_llama(), config).eval(), batch_of((4, 2, 3, 1), 4)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits)
