"""A tiny random model of every multi-modal type of transformers whose language model is a mixture of experts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM, set_seed
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from tests.backbones.models import ALL_SPARSE, COMMON, INDEXER, LATENT_ATTENTION, LINEAR_ATTENTION, TYPES, known_fields

# Ids above those of text: of an image's tokens, and of what stands before and after them.
TEXT_IDS, BEFORE, AFTER, IMAGE = 50, 58, 59, 60
IMAGE_TOKENS, SIDE, PATCH = 4, 16, 4

# What the encoders have in common, under all the names they use for it.
ENCODER: dict[str, object] = {
    "depth": 1,
    "num_hidden_layers": 1,
    "encoder_layers": 1,
    "hidden_size": 16,
    "d_model": 16,
    "intermediate_size": 24,
    "encoder_ffn_dim": 24,
    "num_heads": 2,
    "num_attention_heads": 2,
    "encoder_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "image_size": SIDE,
    "max_img_size": SIDE,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "merge_size": 2,
    "merge_kernel_size": (2, 2),
    "temporal_patch_size": 2,
    "patch_temporal": 1,
    "num_position_embeddings": 16,
    "pos_emb_height": 8,
    "pos_emb_width": 8,
    "deepstack_visual_indexes": [0],
    "out_hidden_size": 32,
    "output_dim": 32,
    "text_hidden_size": 32,
    "vision_output_dim": 16,
    "projection_dim": 16,
    "projection_hidden_dim": 24,
    "projection_intermediate_size": 24,
    "num_mel_bins": 8,
    "downsample_hidden_size": 8,
}
# What the models themselves say of their parts and ids.
WHOLE: dict[str, object] = {
    "image_token_id": IMAGE,
    "image_token_index": IMAGE,
    "video_token_id": 61,
    "video_token_index": 61,
    "audio_token_id": 62,
    "audio_token_index": 62,
    "image_start_token_id": BEFORE,
    "vision_start_token_id": BEFORE,
    "boi_token_id": BEFORE,
    "boi_token_index": BEFORE,
    "image_end_token_id": AFTER,
    "vision_end_token_id": AFTER,
    "eoi_token_id": AFTER,
    "eoi_token_index": AFTER,
    "video_start_token_id": 56,
    "video_end_token_id": 57,
    "audio_start_token_id": 55,
    "boa_token_id": 55,
    "eoa_token_index": 54,
    "image_seq_length": IMAGE_TOKENS,
    "projector_hidden_size": 24,
    "projection_hidden_size": 16,
}


def rope(*sections: int) -> dict[str, object]:
    """Rotary embeddings of time, height and width, over all of a head."""
    kind = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    return {"rope_parameters": {**kind, "mrope_section": list(sections)}}


@dataclass(frozen=True)
class Multimodal:
    """How a type is made small, and how it is given images.

    Attributes:
        text: Fields of the language model.
        encoders: Fields of the encoders by the name of their configuration, beside those of `ENCODER`.
        whole: Fields of the model itself, beside those of `WHOLE`.
        language_model: Model type of the language model, where the multi-modal type has none of its own.
        images: Columns of a batch with that many images.
    """

    images: Callable[[int], dict[str, torch.Tensor]]
    text: Mapping[str, object] = field(default_factory=dict)
    encoders: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    whole: Mapping[str, object] = field(default_factory=dict)
    language_model: str | None = None


def pixels(side: int = SIDE, **columns: list[int]) -> Callable[[int], dict[str, torch.Tensor]]:
    """Whole images, with a row of each column for every image."""
    return lambda count: {
        "pixel_values": torch.randn(count, 3, side, side),
        **{name: torch.tensor([row] * count) for name, row in columns.items()},
    }


def patches(*shape: int, per_image: int = 16, **columns: list[int]) -> Callable[[int], dict[str, torch.Tensor]]:
    """The patches of all images one after the other, with a row of each column for every image."""
    columns = columns or {"image_grid_thw": [1, 4, 4]}
    return lambda count: {
        "pixel_values": torch.randn(count * per_image, *shape),
        **{name: torch.tensor([row] * count) for name, row in columns.items()},
    }


def padded_patches(count: int) -> dict[str, torch.Tensor]:
    """Patches of each image with their places in it."""
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(-1)
    return {"pixel_values": torch.rand(count, 16, 48), "image_position_ids": places.expand(count, -1, -1).clone()}


GRID = patches(2 * 3 * PATCH * PATCH)
MULTIMODAL: dict[str, Multimodal] = {
    "aria": Multimodal(pixels(), whole={"projector_patch_to_query_dict": {16: IMAGE_TOKENS}}),
    "dots3_note": Multimodal(
        patches(3 * PATCH * PATCH),
        text={**TYPES["dots3_note_text"], "shared_experts_intermediate_size": 24},
        encoders={
            "vision_config": {
                "num_hidden_layers": 2,
                "mlp_layer_types": ["dense", "sparse"],
                "num_local_experts": 5,
                "moe_intermediate_size": 12,
                "adapter_in_dim": 16,
                "adapter_out_dim": 32,
            },
            "audio_config": {"adapter_input_size": 16, "adapter_out_dim": 32},
        },
    ),
    "ernie4_5_vl_moe": Multimodal(
        patches(3 * PATCH * PATCH), text={**ALL_SPARSE, **rope(1, 1, 2), "moe_intermediate_size": [16, 12]}
    ),
    "gemma4": Multimodal(
        padded_patches,
        text=TYPES["gemma4_text"],
        encoders={
            "vision_config": {"model_type": "gemma4_vision", "pooling_kernel_size": 2, "position_embedding_size": 16}
        },
    ),
    "glm4v_moe": Multimodal(GRID, text=rope(2, 1, 1)),
    "glm5_next": Multimodal(
        GRID,
        text={
            **LATENT_ATTENTION,
            **INDEXER,
            **ALL_SPARSE,
            "qk_rope_head_dim": 0,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "inkling2": Multimodal(
        patches(2 * PATCH, 2 * PATCH, 3, per_image=IMAGE_TOKENS, image_grid_thw=[1, 2, 2]), text=TYPES["inkling2_text"]
    ),
    "internvl": Multimodal(pixels(), language_model="qwen3_moe"),
    "kimi_k25": Multimodal(patches(3, PATCH, PATCH), text=LATENT_ATTENTION),
    "llama4": Multimodal(
        pixels(),
        text=TYPES["llama4_text"],
        encoders={
            "vision_config": {
                "intermediate_size": 64,
                "pixel_shuffle_ratio": 0.5,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
            }
        },
    ),
    "llava": Multimodal(
        pixels(2 * PATCH),
        encoders={"vision_config": {"model_type": "clip_vision_model", "image_size": 2 * PATCH}},
        language_model="mixtral",
    ),
    "minimax_m3_vl": Multimodal(GRID, text=TYPES["minimax_m3_vl_text"]),
    "mistral_large4": Multimodal(pixels(image_sizes=[SIDE, SIDE]), text={**LATENT_ATTENTION, **INDEXER}),
    "muse_spark": Multimodal(
        patches(3 * PATCH * PATCH),
        text={**ALL_SPARSE, "moe_hidden_size": 20},
        encoders={
            "audio_config": {"patch_sizes": [4], "hidden_sizes": [16], "depths": [1]},
        },
        whole={"out_hidden_size": 64},
    ),
    "nemotron_h_omni": Multimodal(
        patches(3 * PATCH * PATCH, image_grid_hw=[4, 4]),
        text=TYPES["nemotron_h"],
        encoders={"vision_config": {"video_temporal_patch_size": 2}},
        whole={"vision_hidden_size": 16},
    ),
    "qwen3_5_moe": Multimodal(GRID, text=LINEAR_ATTENTION),
    "qwen3_omni_moe_thinker": Multimodal(GRID, text=rope(2, 1, 1), whole={"vision_start_token_id": BEFORE}),
    "qwen3_vl_moe": Multimodal(GRID, text=rope(2, 1, 1)),
    "qwen4_exp": Multimodal(
        GRID,
        text={
            **LINEAR_ATTENTION,
            "layer_types": ["linear_attention", "indexed_attention"],
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 64,
            "indexer_compress_ratio": 4,
        },
    ),
    "step3p7": Multimodal(
        pixels(8 * PATCH),
        text={**ALL_SPARSE, "moe_intermediate_size": 16, "share_expert_dim": 24, "sliding_window": 16},
        encoders={"vision_config": {"image_size": 8 * PATCH}},
    ),
}


def language_model_type(model_type: str) -> str:
    """Model type of the language model."""
    default = CONFIG_MAPPING[model_type]().text_config
    return MULTIMODAL[model_type].language_model or default.model_type


def tiny_multimodal(model_type: str, seed: int = 0) -> nn.Module:
    """Its model with two sparse layers and small encoders."""
    kind, cls = MULTIMODAL[model_type], CONFIG_MAPPING[model_type]
    default = cls()
    fields = {**known_fields(cls, WHOLE), **kind.whole}
    for name in cls.sub_configs:
        own = dict(kind.encoders.get(name, {}))
        part = getattr(default, name, None)
        if name == "text_config":
            text_type = language_model_type(model_type)
            text_cls = CONFIG_MAPPING[text_type] if kind.language_model else type(part)
            fields[name] = {**known_fields(text_cls, COMMON), **kind.text, "model_type": text_type}
        elif part is not None or own:
            part_cls = type(part) if part is not None else CONFIG_MAPPING[own["model_type"]]
            if own.get("model_type") in CONFIG_MAPPING:
                part_cls = CONFIG_MAPPING[own["model_type"]]
            fields[name] = {**known_fields(part_cls, ENCODER), "model_type": part_cls.model_type, **own}
    config = cls(**fields)
    set_seed(seed)
    of_images = model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    auto = AutoModelForImageTextToText if of_images else AutoModelForMultimodalLM
    return auto.from_config(config).eval()


def image_batch(model_type: str, model: nn.Module, seed: int = 0, length: int = 12) -> dict[str, torch.Tensor]:
    """Two rows of text around an image each, the first of them padded on the left by two tokens."""
    set_seed(seed)
    ids = torch.randint(3, TEXT_IDS, (2, length))
    ids[:, 3], ids[:, 4 : 4 + IMAGE_TOKENS], ids[:, 4 + IMAGE_TOKENS] = BEFORE, IMAGE, AFTER
    mask = torch.ones_like(ids)
    ids[0, :2] = mask[0, :2] = 0
    batch = {"input_ids": ids, "attention_mask": mask, **MULTIMODAL[model_type].images(2)}
    return with_modalities(model, batch)


def with_modalities(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Add what the model wants to be told of each token's modality."""
    ids = batch["input_ids"]
    columns = {
        "mm_token_type_ids": ids == IMAGE,
        "moe_mm_token_type_ids": (ids == BEFORE) | (ids == IMAGE) | (ids == AFTER),
    }
    wanted = inspect.signature(type(model).forward).parameters
    return {**batch, **{name: column.long() for name, column in columns.items() if name in wanted}}
