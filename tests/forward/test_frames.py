"""Padding does not count in stacks whose hidden states have another length than their mask."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import (
    BigBirdConfig,
    BigBirdForMaskedLM,
    CanineConfig,
    CanineForTokenClassification,
    FunnelConfig,
    FunnelForTokenClassification,
    LEDConfig,
    LEDForConditionalGeneration,
    LongformerConfig,
    LongformerForMaskedLM,
    PegasusXConfig,
    PegasusXModel,
    PerceiverConfig,
    PerceiverForMaskedLM,
    ProphetNetConfig,
    ProphetNetModel,
    SEWConfig,
    SEWForCTC,
)

from moe_peft import RoutedConfig, router_loss
from moe_peft.forward.frames import frame_mask_of
from moe_peft.telemetry.functions import record

SHARED = {"num_experts": 4, "r": 2, "init_weights": False, "lora_dropout": 0.0}
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def longformer():
    config = LongformerConfig(
        vocab_size=64, attention_window=4, max_position_embeddings=64, pad_token_id=1, **SIZES, **DROPOUT
    )
    return LongformerForMaskedLM(config)


def led():
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "attention_window": 4}
    return LEDForConditionalGeneration(
        LEDConfig(vocab_size=64, d_model=32, dropout=0.0, attention_dropout=0.0, **layers, **heads)
    )


def big_bird():
    config = BigBirdConfig(
        vocab_size=64, block_size=2, num_random_blocks=1, max_position_embeddings=64, **SIZES, **DROPOUT
    )
    return BigBirdForMaskedLM(config)


def funnel():
    config = FunnelConfig(
        vocab_size=64,
        block_sizes=[1, 1, 1],
        d_model=32,
        n_head=4,
        d_head=8,
        d_inner=48,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        num_decoder_layers=1,
    )
    return FunnelForTokenClassification(config)


def canine():
    config = CanineConfig(
        max_position_embeddings=64, num_hash_buckets=64, local_transformer_stride=8, **SIZES, **DROPOUT
    )
    return CanineForTokenClassification(config)


def perceiver():
    config = PerceiverConfig(
        num_latents=5,
        d_latents=32,
        d_model=32,
        num_blocks=1,
        num_self_attends_per_block=1,
        num_self_attention_heads=4,
        num_cross_attention_heads=4,
        qk_channels=32,
        v_channels=32,
        vocab_size=64,
        max_position_embeddings=26,
        attention_probs_dropout_prob=0.0,
    )
    return PerceiverForMaskedLM(config)


def valid_counts(base, targets, batch, *, window=None):
    torch.manual_seed(0)
    model = get_peft_model(base, RoutedConfig(target_modules=targets, router_aux_loss_coef=0.5, **SHARED)).train()
    with record(model) as routings:
        out = model(**batch)
    assert torch.isfinite(router_loss(model))
    return {
        place: (made.probs.shape[0], made.probs.shape[0] if made.valid is None else int(made.valid.sum()))
        for place, (made, *_) in routings.items()
    }, out


def batch_of(lengths, width):
    ids = torch.randint(3, 64, (len(lengths), width), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask + (1 - mask), "attention_mask": mask}


@pytest.mark.parametrize(
    ("build", "targets", "lengths", "width", "padded"),
    [
        (longformer, ["query", "intermediate.dense"], (6, 3, 5), 6, 8),
        (led, ["encoder.layers.0.fc1", "query"], (6, 3, 5), 6, 8),
        (big_bird, ["query", "intermediate.dense"], (23, 3, 5), 23, 24),
    ],
)
def test_rows_that_are_padded_to_whole_windows_have_no_more_tokens(build, targets, lengths, width, padded):
    found, _ = valid_counts(build(), targets, batch_of(lengths, width))
    assert len(found) == 2
    assert set(found.values()) == {(len(lengths) * padded, sum(lengths))}


def test_pooled_positions_have_the_mask_that_the_stack_makes():
    found, _ = valid_counts(funnel(), ["linear_1", "k_head"], batch_of((9, 4), 9))
    by_block = {place: counts for place, counts in found.items() if ".blocks." in place}
    assert len(by_block) == 6
    for place, counts in by_block.items():
        # The first layer of a block reads its keys before they are pooled.
        if ".blocks.0." in place or place.endswith(".blocks.1.0.attention.k_head"):
            assert counts == (18, 13)
        else:
            assert counts[1] < counts[0] < 18, place


def test_molecules_of_characters_have_the_mask_that_the_stack_makes():
    found, _ = valid_counts(canine(), ["intermediate.dense"], batch_of((16, 5), 16))
    counts = {place.split(".")[1]: own for place, own in found.items()}
    assert counts == {"initial_char_encoder": (32, 21), "encoder": (8, 6), "final_char_encoder": (32, 21)}


def test_latents_are_no_positions_of_the_rows():
    found, _ = valid_counts(perceiver(), ["mlp.dense1"], batch_of((24, 9), 26))
    assert set(found.values()) >= {(10, 10)}


def test_squeezed_frames_have_the_mask_that_the_stack_makes():
    torch.manual_seed(0)
    convolutions = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
    layout = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "squeeze_factor": 2}
    quiet = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0, "apply_spec_augment": False}
    base = SEWForCTC(SEWConfig(**SIZES, **convolutions, **layout, **quiet, feat_proj_dropout=0.0, vocab_size=20))
    mask = torch.ones(2, 400, dtype=torch.long)
    mask[1, 150:] = 0
    batch = {"input_values": torch.randn(2, 400), "attention_mask": mask}
    found, _ = valid_counts(base, ["intermediate_dense", "lm_head"], batch)
    frames = [int(base._get_feat_extract_output_lengths(torch.tensor(n))) for n in (400, 150)]
    squeezed = [frames[0] // 2, -(-frames[1] // 2)]
    assert sorted(found.values())[0] == (2 * squeezed[0], sum(squeezed))


def test_rows_of_another_length_are_refused_where_there_is_padding():
    from torch import nn

    class Repeated(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(6, 6)

        def forward(self, inputs_embeds, attention_mask=None):
            return self.up(inputs_embeds.repeat_interleave(2, 1))

    config = RoutedConfig(target_modules=["up"], router_aux_loss_coef=1.0, **SHARED)
    model, x, mask = get_peft_model(Repeated(), config).train(), torch.randn(2, 4, 6), torch.ones(2, 4)
    model(inputs_embeds=x, attention_mask=mask)
    mask[1, 2:] = 0
    with pytest.raises(ValueError, match="up: its rows have another length than the attention mask"):
        model(inputs_embeds=x, attention_mask=mask)
    model.eval()(inputs_embeds=x, attention_mask=mask)


class Sampler(torch.nn.Module):
    def __init__(self, lengths):
        super().__init__()
        self._get_feat_extract_output_lengths = lengths


@pytest.mark.parametrize(
    "lengths",
    [
        lambda n: (n - 1) // 2 + 1,
        lambda n: int((n - 1) / 2 + 1),  # of one number alone
        lambda n: (n // 4, (n - 1) // 2 + 1),  # of two layers
    ],
)
def test_methods_of_a_stack_may_take_one_number_and_give_several(lengths):
    mask = (torch.arange(8) < torch.tensor([8, 5, 0])[:, None]).long()
    found = frame_mask_of(Sampler(lengths), mask)(4)
    assert torch.equal(found.sum(1), torch.tensor([4, 3, 0]))


def test_a_method_that_fails_says_nothing():
    def broken(n):
        raise TypeError(n)

    assert frame_mask_of(Sampler(broken), torch.ones(2, 8))(4) is None


def test_strided_layers_shorten_the_frames_one_after_the_other():
    class Strided(torch.nn.Module):
        kernel_size, stride = 8, 8

        def _compute_sub_sample_lengths_from_attention_mask(self, mask):
            raise NotImplementedError

    mask = (torch.arange(40) < torch.tensor([40, 21])[:, None]).long()
    frames = frame_mask_of(torch.nn.Sequential(Strided(), Strided()), mask)
    assert frames(6).sum(1).tolist() == [6, 3] and frames(1).sum(1).tolist() == [1, 1] and frames(7) is None


def pegasus_x(num_global):
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "block_size": 5}
    return PegasusXModel(PegasusXConfig(vocab_size=64, d_model=32, num_global_tokens=num_global, **layers, **heads))


def test_rows_in_blocks_have_their_mask_and_global_tokens_count_whole():
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    known = frame_mask_of(pegasus_x(7).encoder, mask)
    assert known(10).tolist() == [[True] * 7 + [False] * 3, [True] * 4 + [False] * 6]
    assert known(7).all() and known(7).shape == (2, 7)
    assert known(5) is None
    assert frame_mask_of(pegasus_x(10).encoder, mask)(10) is None
    assert frame_mask_of(pegasus_x(7).decoder, mask)(7).tolist() == mask.bool().tolist()


def test_streams_of_future_tokens_have_the_mask_of_their_row():
    layers = {"num_encoder_layers": 1, "num_decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "ngram": 2}
    decoder = ProphetNetModel(ProphetNetConfig(vocab_size=64, hidden_size=32, **layers, **heads)).decoder
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    known = frame_mask_of(decoder, mask)
    for streams in (1, 2, 3):
        assert torch.equal(known(3 * streams), mask.bool().repeat(1, streams))
    assert known(12) is None
