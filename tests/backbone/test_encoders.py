"""Encoders of images and sound: which parts of a model they are, and what their layers know of a forward pass."""

from __future__ import annotations

import re

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from moe_peft import LoraMoeConfig, MoloraConfig, MovConfig, PerftConfig, SiraConfig, describe, router_loss
from moe_peft.backbone.encoders import encoder_names, encoder_pattern
from moe_peft.backbone.structure import is_below
from moe_peft.layers import RoutedLayer
from moe_peft.places.linear import linear_names, text_linear_names
from moe_peft.telemetry.functions import record
from tests.backbones.multimodal_cases import base_model, batch_for, training_batch, with_adapter
from tests.contract.cases import tiny_olmoe
from tests.tiny import tiny_bert, tiny_t5

EVERYWHERE = {"r": 2, "num_experts": 4, "target_modules": "all-linear"}


def balanced() -> SiraConfig:
    """An adapter of every linear layer, with router losses."""
    return SiraConfig(**EVERYWHERE, top_k=2, expert_dropout=0.0, capacity_factor=None, lora_dropout=0.0)


def scaled() -> MovConfig:
    """Vectors at every linear layer."""
    return MovConfig(num_experts=4, target_modules="all-linear", router_granularity="token")


def contexts(model: nn.Module, **batch) -> dict[str, list]:
    """The contexts that each place saw in one forward."""
    with record(model) as routings:
        model(**batch)
    return {place: [routing.context for routing in made] for place, made in routings.items()}


def meta(cls, config) -> nn.Module:
    with torch.device("meta"):
        return cls(config)


def test_models_of_text_have_no_encoders_of_images():
    for model in (tiny_olmoe(), tiny_bert(), tiny_t5()):
        assert encoder_names(model) == set()


def test_what_stands_beside_the_language_model_is_no_part_of_it():
    assert encoder_names(base_model("llava")) == {"model.vision_tower", "model.multi_modal_projector"}
    found = encoder_names(base_model("dots3_note"))
    assert {"model.vision_tower", "model.audio_tower"} <= found and "lm_head" not in found


def test_an_encoder_among_the_layers_of_the_language_model_is_known_by_its_name():
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = IdeficsConfig(**small, vocab_size=32)
    assert encoder_names(meta(IdeficsForVisionText2Text, config)) == {"model.vision_model"}


def test_text_and_images_are_equals_in_a_model_that_predicts_no_tokens():
    model = meta(CLIPModel, CLIPConfig())
    assert encoder_names(model) == set() and text_linear_names(model) == linear_names(model)


def test_the_pattern_matches_the_modules_of_the_encoders_and_no_others():
    model = base_model("dots3_note")
    encoders = encoder_names(model)
    for name, _ in model.named_modules():
        assert bool(re.fullmatch(encoder_pattern(encoders), name)) == is_below(name, encoders)


def test_all_linear_reaches_encoders_but_no_output_head():
    for model_type in ("llava", "nemotron_h_omni"):
        places = describe(base_model(model_type), MoloraConfig(**EVERYWHERE)).places
        assert {place.rows for place in places} == {"tokens", "media"}
        assert not [place.name for place in places if "lm_head" in place.name]


@pytest.mark.parametrize("make", [balanced, scaled])
@pytest.mark.parametrize(
    ("model_type", "length"),
    [("llava", 12), ("internvl", 20), ("qwen3_vl_moe", 16), ("dots3_note", 16)],
    ids=["an image per row", "more patches than tokens", "as many patches as tokens", "as many patches, experts"],
)
def test_the_mask_of_the_text_reaches_no_encoder(model_type, length, make):
    batch = batch_for(model_type, length)
    found = contexts(with_adapter(model_type, make()), **batch)
    encoders = encoder_names(base_model(model_type))
    assert {is_below(place, encoders) for place in found} == {True, False}
    for place, seen in found.items():
        for context in seen:
            if is_below(place, encoders):
                assert context.valid is None and context.groups is None
            else:
                assert torch.equal(context.valid, batch["attention_mask"].reshape(-1).bool())
                assert context.sequences.tolist() == [0] * length + [1] * length


def test_images_are_the_sequences_of_an_encoder_that_keeps_them_apart():
    found = contexts(with_adapter("llava", balanced()), **batch_for("llava"))
    context = found["model.vision_tower.encoder.layers.0.mlp.fc1"][0]
    assert context.num_sequences == 2 and context.sequences.tolist() == [0] * 5 + [1] * 5


def test_padding_of_the_text_does_not_change_the_router_losses():
    model, batch = with_adapter("llava", balanced()).train(), batch_for("llava")
    model(**batch)
    loss = router_loss(model)
    padded = {
        **batch,
        "input_ids": nn.functional.pad(batch["input_ids"], (3, 0)),
        "attention_mask": nn.functional.pad(batch["attention_mask"], (3, 0)),
    }
    model(**padded)
    assert loss > 0
    torch.testing.assert_close(router_loss(model), loss, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "llava"])
def test_gradients_are_the_same_under_checkpointing(model_type, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = with_adapter(model_type, balanced()).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**training_batch(model_type)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, checkpointed = gradients
    encoders = encoder_names(base_model(model_type))
    if reentrant:
        # Reentrant checkpoints of an encoder whose input needs no gradient compute none, of any adapter of peft.
        plain = {name: grad for name, grad in plain.items() if name in checkpointed}
        assert any(not is_below(name.removeprefix("base_model.model."), encoders) for name in plain)
    assert plain.keys() == checkpointed.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_groups_of_samples_are_refused_where_rows_belong_to_images():
    config = LoraMoeConfig(**EVERYWHERE, expert_groups=[0, 0, 1, 1])
    with pytest.raises(ValueError, match="expert_groups needs the group of every row, or the router") as refusal:
        with_adapter("llava", config)
    pattern = re.search(r"exclude_modules='([^']*)'", str(refusal.value)).group(1).replace("\\\\", "\\")
    config = LoraMoeConfig(**EVERYWHERE, expert_groups=[0, 0, 1, 1], exclude_modules=pattern)
    model = with_adapter("llava", config).train()
    model(**training_batch("llava"), task_type=torch.tensor([0, 1])).loss.backward()
    assert router_loss(model) > 0


def test_rows_of_a_batch_do_not_choose_adapters_of_an_encoder():
    names, batch = ["default", "__base__"], batch_for("llava")
    with pytest.raises(ValueError, match=r"reads images or sound.*target_modules=None does"):
        with_adapter("llava", MoloraConfig(**EVERYWHERE))(**batch, adapter_names=names)
    model = with_adapter("llava", MoloraConfig(r=2, num_experts=4))
    mixed = model(**batch, adapter_names=names).logits
    torch.testing.assert_close(mixed[0], model(**batch).logits[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1], base_model("llava")(**batch).logits[1], rtol=1e-4, atol=1e-5)


def test_blocks_of_one_modality_see_the_mask_of_their_own_tokens():
    batch = batch_for("ernie4_5_vl_moe", length := 16)
    mask_T, is_media_T = batch["attention_mask"].reshape(-1).bool(), batch["moe_mm_token_type_ids"].reshape(-1).bool()
    rows_T = torch.arange(2).repeat_interleave(length)
    model = with_adapter("ernie4_5_vl_moe", PerftConfig(r=2, num_experts=4, lora_dropout=0.0))
    found = contexts(model, **batch)
    assert len(found) == 4
    for place, (context,) in found.items():
        own_T = is_media_T if place.endswith("vision_moe") else ~is_media_T
        assert torch.equal(context.valid, mask_T[own_T])
        assert torch.equal(context.sequences, rows_T[own_T]) and context.num_sequences == 2


def test_blocks_of_an_encoder_are_adapted_where_they_are_named():
    config = PerftConfig(r=2, num_experts=4, lora_dropout=0.0, target_modules=["vision_tower.blocks.1.mlp"])
    model, batch = with_adapter("dots3_note", config, random=False), batch_for("dots3_note", 16)
    assert torch.equal(model(**batch).logits, base_model("dots3_note")(**batch).logits)
    ((place, (context,)),) = contexts(model.train(), **batch).items()
    assert place == "model.vision_tower.blocks.1.mlp" and context.valid is None
    model(**training_batch("dots3_note")).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(TypeError, match="no experts module of the backbone"):
        with_adapter("dots3_note", PerftConfig(variant="E", target_modules=["vision_tower.blocks.1.mlp.experts"]))


def dense_llava(**text: int) -> nn.Module:
    """A model of images and text without experts."""
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **small, "image_size": 8, "patch_size": 4},
        text_config={"model_type": "llama", **small, "num_key_value_heads": 2, "vocab_size": 64, **text},
        image_token_index=60,
    )
    return LlavaForConditionalGeneration(config)


def test_mlps_of_a_dense_model_are_those_of_its_language_model():
    expected = [f"model.language_model.layers.{layer}.mlp" for layer in range(2)]
    model = dense_llava()
    assert [place.name for place in describe(model, PerftConfig()).places] == expected
    model = get_peft_model(model, PerftConfig(target_modules=["vision_tower.encoder.layers.0.mlp"]))
    model.add_adapter("text", PerftConfig())
    layers = {
        name: module for name, module in model.get_base_model().named_modules() if isinstance(module, RoutedLayer)
    }
    assert [name for name, layer in layers.items() if "text" in layer.experts] == expected
    assert [name for name, layer in layers.items() if "default" in layer.experts] == [
        "model.vision_tower.encoder.layers.0.mlp"
    ]


def test_the_width_of_a_head_is_that_of_the_language_model():
    model = dense_llava(hidden_size=24)
    places = describe(model, MovConfig(num_experts=4, head_dim=12)).places
    assert len(places) == 6 and not [place for place in places if place.rows == "media"]
    with pytest.raises(ValueError, match=r"head_dim=16 does not divide the 24 outputs of model\.language_model"):
        describe(model, MovConfig(num_experts=4, head_dim=16))
