"""Clips of several lengths beside text: their padding counts nowhere, or is refused where it is not known."""

from __future__ import annotations

import math

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    GraniteSpeechConfig,
    GraniteSpeechForConditionalGeneration,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from moe_peft import RoutedConfig
from tests.compare import counts

TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
MEL, SOUND = 16, 60
LENGTHS = (40, 21, 33)


def adapted(model):
    """Adapters at all linear layers but those of images."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = [name for name in names if not name.endswith("lm_head") and "visual" not in name]
    fields = {"num_experts": 2, "r": 2, "lora_dropout": 0.0, "router_aux_loss_coef": 0.5}
    return get_peft_model(model, RoutedConfig(target_modules=targets, **fields)).train()


def frames_of(clips):
    """(B, T, MEL) frames, zero after the end of each clip."""
    made = torch.zeros(len(clips), max(LENGTHS[clip] for clip in clips), MEL)
    for row, clip in enumerate(clips):
        made[row, : LENGTHS[clip]] = torch.randn(LENGTHS[clip], MEL, generator=torch.Generator().manual_seed(clip))
    return made


def text_of(numbers):
    """Rows with that many places for sound, and three tokens of text."""
    ids = torch.zeros(len(numbers), max(numbers) + 5, dtype=torch.long)
    for row, number in enumerate(numbers):
        ids[row, : number + 5] = torch.tensor([58, *[SOUND] * number, 59, 5, 6, 7])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def qwen_omni():
    sound = {"num_mel_bins": MEL, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
    sound |= {"d_model": 32, "n_window": 8, "output_dim": 32, "max_source_positions": 64}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    images = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
    ids = {"audio_token_id": SOUND, "image_token_id": 61, "video_token_id": 62, "pad_token_id": 0}
    config = Qwen2_5OmniThinkerConfig(
        audio_config=sound,
        text_config={**TEXT, "rope_parameters": rope},
        vision_config={**images, "patch_size": 4, "fullatt_block_indexes": [0]},
        **ids,
    )
    config.audio_start_token_id, config.audio_end_token_id = 58, 59
    config.vision_start_token_id, config.vision_end_token_id = 56, 57
    return Qwen2_5OmniThinkerForConditionalGeneration(config)


def qwen_batch(clips):
    mask = (torch.arange(max(LENGTHS[c] for c in clips)) < torch.tensor([LENGTHS[c] for c in clips])[:, None]).long()
    numbers = [((LENGTHS[clip] - 1) // 2 - 1) // 2 + 1 for clip in clips]
    return {
        **text_of(numbers),
        "input_features": frames_of(clips).transpose(1, 2),
        "feature_attention_mask": mask,
    }


def granite():
    sound = {"input_dim": MEL, "num_layers": 2, "hidden_dim": 32, "feedforward_mult": 2, "num_heads": 4}
    sound |= {"dim_head": 8, "output_dim": 10, "context_size": 6, "max_pos_emb": 8, "dropout": 0.0}
    between = {"model_type": "blip_2_qformer", "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    config = GraniteSpeechConfig(
        text_config={"model_type": "granite", **TEXT},
        encoder_config={**sound, "conv_kernel_size": 3},
        projector_config={**between, "num_hidden_layers": 1, "encoder_hidden_size": 32},
        audio_token_index=SOUND,
        has_lora_adapter=False,
        downsample_rate=2,
        window_size=4,
    )
    return GraniteSpeechForConditionalGeneration(config)


def granite_batch(clips):
    numbers = [math.ceil(LENGTHS[clip] / 4) * 2 for clip in clips]
    mask = torch.arange(max(numbers)) < torch.tensor(numbers)[:, None]
    return {**text_of(numbers), "input_features": frames_of(clips), "input_features_mask": mask}


def test_padding_of_clips_that_the_stack_packs_counts_nowhere():
    model = adapted(qwen_omni())
    alone = [counts(model, qwen_batch([clip])) for clip in range(3)]
    together = counts(model, qwen_batch([0, 1, 2]))
    assert any("audio_tower" in place for place in together)
    assert together == {place: sum(own[place] for own in alone) for place in together}


def test_padding_of_clips_whose_frames_have_no_mask_is_refused_by_place():
    model = adapted(granite())
    counts(model, granite_batch([0]))
    counts(model, granite_batch([0, 0]))
    with pytest.raises(ValueError, match=r"encoder\.input_linear: its rows have another length .*router losses"):
        model(**granite_batch([0, 1, 2]))
    model.eval()(**granite_batch([0, 1, 2]))
