"""Padding changes no router loss in models that are made of several: encoders of sound, decoders of codebooks, labels.

Each batch holds the same rows, padded less and padded more.
"""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch.nn.functional import pad
from transformers import (
    BertConfig,
    BertLMHeadModel,
    EncodecConfig,
    EncodecModel,
    HubertConfig,
    HubertModel,
    MusicgenDecoderConfig,
    MusicgenForCausalLM,
    MusicgenForConditionalGeneration,
    ReformerConfig,
    ReformerForMaskedLM,
    SpeechEncoderDecoderModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    WavLMConfig,
    WavLMModel,
)

from moe_peft import RoutedConfig, router_loss
from moe_peft.telemetry.functions import record

SHARED = {"num_experts": 4, "r": 2, "init_weights": False, "lora_dropout": 0.0}
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
SOUND = {
    "conv_dim": (8, 8),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "apply_spec_augment": False,
    "layerdrop": 0.0,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
}
TEXT = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "dropout_rate": 0.0}
LABELS = torch.tensor([[5, 6, 7, 8], [9, -100, -100, -100], [3, 4, -100, -100]])
PAD = 63


def batch_of(lengths, width, name="input_ids"):
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 60, (length,), generator=generator) for length in lengths]
    values = torch.stack([pad(row, (0, width - len(row))) for row in rows])
    return {name: values if name == "input_ids" else values / 30.0, "attention_mask": mask}


def sound(width):
    return batch_of((400, 300, 203), width, "input_values")


def speech_and_text():
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 64}
    decoder = BertConfig(**SIZES, **quiet, vocab_size=64, is_decoder=True, add_cross_attention=True)
    encoder = HubertModel(HubertConfig(**SIZES, **SOUND, vocab_size=20))
    model = SpeechEncoderDecoderModel(encoder=encoder, decoder=BertLMHeadModel(decoder))
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    batches = [{**sound(400), "labels": LABELS}, {**sound(460), "labels": pad(LABELS, (0, 3), value=-100)}]
    return model, ["intermediate_dense", "query", "intermediate.dense", "key"], batches


def heads():
    """Linear layers that read each head of each frame."""
    return WavLMModel(WavLMConfig(**SIZES, **SOUND, vocab_size=20)), ["gru_rel_pos_linear"], [sound(400), sound(460)]


def text_and_labels():
    model = T5ForConditionalGeneration(T5Config(**TEXT, decoder_start_token_id=0, pad_token_id=0))
    batches = [
        {**batch_of((7, 4, 6), 7), "labels": LABELS},
        {**batch_of((7, 4, 6), 9), "labels": pad(LABELS, (0, 3), value=-100)},
    ]
    return model, ["q", "v", "wi"], batches


def text_and_labels_kept_back():
    """What a trainer that smooths labels gives the model: the tokens that they are shifted to."""
    model, targets, batches = text_and_labels()
    ended = torch.tensor([[5, 6, 7, 1], [1, -100, -100, -100], [3, 1, -100, -100]])
    for batch in batches:
        labels = pad(ended, (0, batch.pop("labels").shape[1] - 4), value=-100)
        batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    return model, targets, batches


def codebooks(num_rows):
    layers = {"num_hidden_layers": 1, "num_attention_heads": 4, "ffn_dim": 48, "num_codebooks": 4, "hidden_size": 32}
    ids = {"pad_token_id": PAD, "bos_token_id": PAD}
    decoder = MusicgenDecoderConfig(vocab_size=64, max_position_embeddings=64, dropout=0.0, **layers, **ids)
    codec = EncodecConfig(num_filters=4, hidden_size=16, codebook_size=64, num_lstm_layers=1, target_bandwidths=[1.5])
    parts = {"text_encoder": T5EncoderModel(T5Config(**TEXT)), "audio_encoder": EncodecModel(codec)}
    model = MusicgenForConditionalGeneration(**parts, decoder=MusicgenForCausalLM(decoder))
    model.set_attn_implementation("eager")
    model.config.decoder_start_token_id = model.config.pad_token_id = PAD
    text = batch_of((7, 4, 6)[:num_rows], 7)
    codes = torch.randint(3, 60, (num_rows * 4, 8), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(8) < torch.tensor([5, 8, 6])[:num_rows, None]).long()
    batches = [
        {**text, "decoder_input_ids": pad(codes, (0, more), value=PAD), "decoder_attention_mask": pad(mask, (0, more))}
        for more in (0, 3)
    ]
    return model, ["fc1", "self_attn.v_proj", "encoder_attn.k_proj"], batches


@pytest.mark.parametrize(
    "build",
    [
        speech_and_text,
        heads,
        text_and_labels,
        text_and_labels_kept_back,
        lambda: codebooks(3),
        lambda: codebooks(1),
    ],
    ids=[
        "speech and text",
        "heads of frames",
        "labels alone",
        "labels kept back",
        "codebooks",
        "codebooks of one sample",
    ],
)
def test_rows_that_are_padded_more_have_the_same_router_losses(build):
    torch.manual_seed(0)
    base, targets, batches = build()
    losses = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}
    model = get_peft_model(base, RoutedConfig(target_modules=targets, **losses, **SHARED)).train()
    found = []
    for batch in batches:
        with record(model) as routings:
            model(**batch)
        counts = {place: sum(int(made.valid.sum()) for made in own) for place, own in routings.items()}
        found.append((counts, router_loss(model).detach()))
    (less, loss_of_less), (more, loss_of_more) = found
    assert less == more and len(less) > 0
    torch.testing.assert_close(loss_of_more, loss_of_less, rtol=1e-4, atol=1e-5)


def test_reformer_counts_the_tokens_of_its_rows_alone_whole_or_in_slices():
    sizes = {"attention_head_size": 8, "feed_forward_size": 48, "hidden_size": 32, "num_attention_heads": 4}
    chunks = {"local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 2, "hash_seed": 0}
    for slices in (0, 2):
        torch.manual_seed(0)
        config = ReformerConfig(
            vocab_size=64,
            attn_layers=["local", "lsh"],
            axial_pos_embds=False,
            max_position_embeddings=64,
            is_decoder=False,
            chunk_size_feed_forward=slices,
            **sizes,
            **chunks,
        )
        targets = ["query", "feed_forward.dense.dense"]
        model = get_peft_model(ReformerForMaskedLM(config), RoutedConfig(target_modules=targets, **SHARED)).train()
        with record(model) as routings:
            model(**batch_of((7, 4, 6), 12))
        assert len(routings) == 3
        for made in routings.values():
            assert sum(int(routing.valid.sum()) for routing in made) == 17
            assert sum(len(routing.valid) for routing in made) == 36
