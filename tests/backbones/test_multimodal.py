"""Adapters keep their promises on multi-modal models with images in the batch, and act in the language model."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model

from moe_peft import EsftConfig, LoraMoeConfig, PerftConfig, score_experts
from moe_peft.backbone.encoders import encoder_names
from moe_peft.backbone.structure import find_moe_layers, is_below
from moe_peft.layers import RoutedLayer
from tests.backbones.cases import assert_adapter_alone_has_gradients
from tests.backbones.models import VOCAB
from tests.backbones.multimodal_cases import (
    AMBIGUOUS,
    CASES,
    LINEAR_CASES,
    NO_FFN_LINEARS,
    OPAQUE,
    SCORED_CASES,
    TYPE_CASES,
    adapted,
    base_model,
    batch_for,
    marked,
    routing,
    sparse_blocks,
    training_batch,
)
from tests.backbones.multimodal_models import TEXT_IDS, with_modalities
from tests.slices import thinned

TEXT_COLUMNS = ("input_ids", "attention_mask", "labels")
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
FOLLOWED_CASES = [case for case in CASES if case.values[1] != "perft-r"]


def places(model) -> list[str]:
    return [name for name, module in model.get_base_model().named_modules() if isinstance(module, RoutedLayer)]


@pytest.mark.parametrize("model_type", TYPE_CASES)
def test_the_blocks_are_those_of_the_two_sparse_layers_of_the_language_model(model_type):
    model = base_model(model_type)
    blocks = sparse_blocks(model)
    assert len({name.partition(".layers.")[0] for name in blocks}) == 1
    assert all("language_model." in name for name in blocks)
    assert len({name.partition(".layers.")[2].partition(".")[0] for name in blocks}) == 2
    assert places(adapted(model_type, "perft-r")) == blocks


def test_experts_of_an_encoder_are_left_alone():
    names = [name for name, _ in base_model("dots3_note").named_modules() if name.endswith("experts")]
    assert any("vision_tower" in name for name in names)
    assert not any("vision_tower" in layer.experts for layer in find_moe_layers(base_model("dots3_note")))


@pytest.mark.parametrize(("model_type", "method"), thinned([*CASES, *LINEAR_CASES], 0))
def test_step_zero_output_is_the_base_output(model_type, method):
    base, batch = base_model(model_type), batch_for(model_type)
    model = adapted(model_type, method, random=False)
    # Copies of experts run on the rows that use them, and a GEMM of fewer rows may round otherwise; the scaled tensor
    # of a mixture of vectors is u * (1 + 0), to rounding.
    tolerance = {"esft": 1e-6, "mov": 1e-5}.get(method, 0.0)
    expected = base(**batch).logits
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=tolerance)
    changed = adapted(model_type, method)
    found = changed(**batch).logits
    assert not torch.equal(found, expected)
    assert not torch.equal(changed(**{**batch, "pixel_values": 0.5 * batch["pixel_values"]}).logits, found)


# Of ERNIE's blocks for one modality nothing tells which tokens they read where there are as many of text as of images.
@pytest.mark.filterwarnings("ignore:.*reads some tokens of the batch alone:moe_peft.MoePeftWarning")
@pytest.mark.parametrize(("model_type", "method"), thinned(CASES, 1))
def test_gradients_arrive_at_the_adapter_and_nowhere_else(model_type, method):
    model = adapted(model_type, method).train()
    model(**training_batch(model_type)).loss.backward()
    assert_adapter_alone_has_gradients(model)


@pytest.mark.parametrize(("model_type", "method"), LINEAR_CASES)
def test_default_linear_places_lie_in_the_language_model(model_type, method):
    model = adapted(model_type, method).train()
    encoders = encoder_names(base_model(model_type))
    assert places(model) and not [name for name in places(model) if is_below(name, encoders)]
    model(**training_batch(model_type)).loss.backward()
    for name, parameter in model.named_parameters():
        is_adapter = f".{model.base_model.prefix}" in name
        assert parameter.requires_grad == (parameter.grad is not None) == is_adapter, name


@pytest.mark.parametrize("model_type", [marked(model_type) for model_type in NO_FFN_LINEARS])
def test_an_encoder_does_not_stand_in_for_ffns_that_are_experts(model_type):
    with pytest.raises(ValueError, match=r"no linear layer of the kind 'ffn'.*mixtures of fused experts"):
        get_peft_model(copy.deepcopy(base_model(model_type)), LoraMoeConfig())


@pytest.mark.parametrize(("model_type", "method"), thinned(CASES, 2))
def test_save_and_load_are_equal_to_the_last_bit(model_type, method, tmp_path):
    model, batch = adapted(model_type, method), batch_for(model_type)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base_model(model_type)), tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize(("model_type", "method"), thinned(CASES, 3))
def test_generation_with_cache_follows_the_whole_forward(model_type, method):
    model, batch, reserved = adapted(model_type, method), batch_for(model_type), list(range(TEXT_IDS, VOCAB))
    new = 5
    ids = model.generate(
        **batch, max_new_tokens=new, min_new_tokens=new, do_sample=False, use_cache=True, suppress_tokens=reserved
    )
    mask = torch.cat([batch["attention_mask"], torch.ones(2, new, dtype=torch.long)], 1)
    whole = with_modalities(base_model(model_type), {**batch, "input_ids": ids, "attention_mask": mask})
    logits = model(**whole).logits[:, -new - 1 : -1]
    logits[..., [*reserved, model.config.get_text_config().eos_token_id]] = -torch.inf
    assert torch.equal(logits.argmax(-1), ids[:, -new:])


@pytest.mark.parametrize("model_type", TYPE_CASES)
def test_text_without_images_is_served_too(model_type):
    batch = {name: value for name, value in training_batch(model_type).items() if name in TEXT_COLUMNS}
    batch["input_ids"] = batch["input_ids"].clamp(max=TEXT_IDS)
    base, model = base_model(model_type), adapted(model_type, "perft-r", random=False)
    assert torch.equal(model(**batch).logits, base(**batch).logits)
    model = adapted(model_type, "perft-r").train()
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        # Only ERNIE has blocks of images alone.
        reached = f".{model.base_model.prefix}" in name and ".vision_moe." not in name
        assert (parameter.grad is not None) == reached, name


@pytest.mark.parametrize(("model_type", "method"), thinned(FOLLOWED_CASES, 4))
def test_experts_implementations_agree(model_type, method):
    model, batch = adapted(model_type, method), batch_for(model_type)
    base = model.get_base_model()
    if not base._can_set_experts_implementation():
        pytest.skip("transformers has one implementation of these experts")
    logits = []
    for implementation in IMPLEMENTATIONS:
        base.set_experts_implementation(implementation)
        logits.append(model(**batch).logits)
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", SCORED_CASES)
def test_trained_experts_equal_the_model_with_those_experts_replaced(model_type):
    model, batch = adapted(model_type, "esft"), batch_for(model_type)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", SCORED_CASES)
def test_scores_are_those_of_the_tokens_of_text_and_images(model_type):
    model, batch = base_model(model_type), batch_for(model_type)
    scores = score_experts(model, [batch], show_progress=False)
    counts_T = batch["attention_mask"].reshape(-1).bool()
    assert scores.num_tokens == int(counts_T.sum()) and scores.num_samples == 2
    for layer in find_moe_layers(model):
        index_TK, weights_TK = routing(model_type)[layer.experts]
        gates_E = torch.zeros(layer.num_experts, dtype=torch.float64)
        gates_E.index_add_(0, index_TK[counts_T].reshape(-1), weights_TK[counts_T].reshape(-1).double())
        expected = gates_E / int(counts_T.sum())
        torch.testing.assert_close(scores.of(layer.index, "gate"), expected, rtol=0, atol=1e-6)
    inside = score_experts(adapted(model_type, "perft-r", random=False), [batch], show_progress=False)
    assert all(torch.equal(inside.of(layer, "gate"), scores.of(layer, "gate")) for layer in scores.layers)
    other = score_experts(model, [{**batch, "pixel_values": -batch["pixel_values"]}], show_progress=False)
    assert any(not torch.equal(other.of(layer, "gate"), scores.of(layer, "gate")) for layer in scores.layers)


@pytest.mark.parametrize("model_type", OPAQUE)
def test_adapters_that_follow_experts_are_refused_where_nobody_can(model_type):
    for config in (PerftConfig(variant="E"), EsftConfig(experts={"0": [1]})):
        with pytest.raises(ValueError, match=f"{OPAQUE[model_type]}.*Use an adapter with a router of its own"):
            get_peft_model(copy.deepcopy(base_model(model_type)), config)
    with pytest.raises(ValueError, match=OPAQUE[model_type]):
        score_experts(base_model(model_type), [batch_for(model_type)], show_progress=False)


@pytest.mark.parametrize("model_type", AMBIGUOUS)
def test_experts_that_their_layer_does_not_tell_apart_are_neither_selected_nor_scored(model_type):
    with pytest.raises(ValueError, match=AMBIGUOUS[model_type]):
        get_peft_model(copy.deepcopy(base_model(model_type)), EsftConfig(experts={"0": [1]}))
    with pytest.raises(ValueError, match="several expert modules in one layer"):
        score_experts(base_model(model_type), [batch_for(model_type)], show_progress=False)
