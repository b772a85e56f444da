"""What one pass of a stack tells about tokens that are not its own: those of another tower, and those in the cache."""

from __future__ import annotations

import torch
from peft import get_peft_model
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, set_seed

from moe_peft import PerftConfig, telemetry
from moe_peft.context import find_tracker
from tests.tiny import padded_batch, tiny_llama

IMAGE = 60
PATCHES = 4


def tiny_llava() -> LlavaForConditionalGeneration:
    set_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
    )
    config = LlavaConfig(vision_config=vision, text_config=tiny_llama().config, image_token_index=IMAGE)
    return LlavaForConditionalGeneration(config)


def test_patches_of_images_are_not_masked_by_the_padding_of_the_text():
    model = get_peft_model(tiny_llava(), PerftConfig(r=2)).train()
    batch = padded_batch([9, 12])
    batch["input_ids"][:, 1 : 1 + PATCHES] = IMAGE
    counted = {}
    find_tracker(model).training_observers.append(lambda place, _, routing: counted.update({place: routing.valid}))
    model(**batch, pixel_values=torch.randn(2, 3, 28, 28)).logits.sum().backward()
    text = {place: valid for place, valid in counted.items() if "language_model" in place}
    assert len(text) == len(counted) - len(text) == 2
    assert all(torch.equal(valid.view(2, 12), batch["attention_mask"].bool()) for valid in text.values())
    assert all(valid is None for place, valid in counted.items() if place not in text)


def test_tokens_of_a_decoding_step_have_the_last_columns_of_the_mask():
    model = get_peft_model(tiny_llama(), PerftConfig(r=2)).eval()
    batch = padded_batch([4, 6], side="left")
    with torch.no_grad(), telemetry.record(model) as routings:
        cache = model(**batch).past_key_values
        mask = torch.cat([batch["attention_mask"], torch.tensor([[1], [0]])], dim=1)
        model(input_ids=torch.tensor([[5], [0]]), attention_mask=mask, past_key_values=cache)
    for first, second in routings.values():
        assert first.valid.sum() == 10 and second.valid.tolist() == [True, False]
