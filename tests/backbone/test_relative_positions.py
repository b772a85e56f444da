"""Rows of relative positions are no tokens: their layers have no router loss, and 'all-linear' leaves them out."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    DebertaConfig,
    DebertaModel,
    DebertaV2Config,
    DebertaV2Model,
    ParakeetEncoder,
    ParakeetEncoderConfig,
    SeamlessM4TConfig,
    SEWDConfig,
    SEWDModel,
    Wav2Vec2BertConfig,
    Wav2Vec2BertModel,
    Wav2Vec2ConformerConfig,
    Wav2Vec2ConformerModel,
)
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nAudioRelativePositionEmbedding
from transformers.models.seamless_m4t.modeling_seamless_m4t import SeamlessM4TConformerSelfAttention

from moe_peft import MoloraConfig, RoutedConfig, describe, router_loss
from moe_peft.backbone.relative_positions import below_positions, position_readers
from moe_peft.places.linear import linear_names
from tests.compare import counts

FIELDS = {"num_experts": 4, "r": 2, "init_weights": False, "lora_dropout": 0.0, "router_aux_loss_coef": 0.5}
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
QUIET = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0}
TEXT_QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "vocab_size": 64}
CONVOLUTIONS = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
BALANCING = {"localized_balancing": 0.1}
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 4}


def conformer():
    layout = {"position_embeddings_type": "relative", "conv_depthwise_kernel_size": 3, "apply_spec_augment": False}
    grouped = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer"}
    return Wav2Vec2ConformerModel(
        Wav2Vec2ConformerConfig(
            **SIZES, **QUIET, **CONVOLUTIONS, **layout, **grouped, feat_proj_dropout=0.0, conformer_conv_dropout=0.0
        )
    )


def bert_of_sound():
    layout = {"position_embeddings_type": "relative", "feature_projection_input_dim": 16, "apply_spec_augment": False}
    return Wav2Vec2BertModel(
        Wav2Vec2BertConfig(**SIZES, **QUIET, **layout, conv_depthwise_kernel_size=3, conformer_conv_dropout=0.0)
    )


def parakeet():
    config = ParakeetEncoderConfig(
        **SIZES,
        dropout=0.0,
        dropout_positions=0.0,
        layerdrop=0.0,
        activation_dropout=0.0,
        attention_dropout=0.0,
        conv_kernel_size=3,
        subsampling_factor=2,
        subsampling_conv_channels=8,
        num_mel_bins=16,
    )
    return ParakeetEncoder(config)


def deberta():
    return DebertaModel(DebertaConfig(**SIZES, **TEXT_QUIET, **RELATIVE))


def deberta_v2(**fields):
    return DebertaV2Model(DebertaV2Config(**SIZES, **TEXT_QUIET, **RELATIVE, **fields))


def deberta_v2_shared():
    return deberta_v2(share_att_key=True)


def sew_d():
    grouped = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False}
    grouped["feat_extract_norm"] = "layer"  # a norm over the group would measure the padding
    return SEWDModel(
        SEWDConfig(
            **SIZES,
            **CONVOLUTIONS,
            **grouped,
            **RELATIVE,
            hidden_dropout=0.0,
            activation_dropout=0.0,
            attention_dropout=0.0,
            feat_proj_dropout=0.0,
            layerdrop=0.0,
            squeeze_factor=1,
            share_att_key=True,
        )
    )


def text(lengths, width):
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    ids = (3 + (7 * torch.arange(width) + 5 * torch.arange(len(lengths))[:, None]) % 50) * mask
    return {"input_ids": ids, "attention_mask": mask}


def sound(lengths, width, features=None, name="input_values"):
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    shape = (len(lengths), max(lengths)) if features is None else (len(lengths), max(lengths), features)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = nn.functional.pad(
        values, (0, width - max(lengths)) if features is None else (0, 0, 0, width - max(lengths))
    )
    return {name: values * (mask if features is None else mask[..., None]), "attention_mask": mask}


def samples(lengths, width):
    return sound([40 * n for n in lengths], 40 * width)


def features(lengths, width):
    return sound([8 * n for n in lengths], 8 * width, 16, "input_features")


# Model, its batch, and ends of the names of layers that read positions alone, and of those that read tokens as well.
CASES = {
    "conformer": (conformer, samples, {"linear_pos"}, set()),
    "wav2vec2-bert": (bert_of_sound, features, {"linear_pos"}, set()),
    "parakeet": (parakeet, features, {"relative_k_proj"}, set()),
    "deberta": (deberta, text, {"pos_proj", "pos_q_proj"}, set()),
    "deberta-v2": (deberta_v2, text, {"pos_key_proj", "pos_query_proj"}, set()),
    "deberta-v2 shared": (deberta_v2_shared, text, set(), {"query_proj", "key_proj"}),
    "sew-d shared": (sew_d, samples, set(), {"query_proj", "key_proj"}),
}


def adapted(build, ends):
    torch.manual_seed(0)
    base = build()
    names = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    targets = [name for name in names if ends is None or name.endswith(tuple(ends))]
    model = get_peft_model(base, RoutedConfig(target_modules=targets, **FIELDS)).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()  # in training it measures the padded frames of a backbone as well
    return model


@pytest.mark.parametrize("case", CASES)
def test_layers_of_relative_positions_are_told_from_those_of_tokens(case):
    build, _, alone, mixed = CASES[case]
    base = build()
    linears = {name for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    readers = {name: reader for name, reader in position_readers(base).items() if name in linears}
    assert {name.rpartition(".")[2] for name in readers} == alone | mixed
    assert {name.rpartition(".")[2] for name in below_positions(base) & linears} == alone
    places = {place.name for place in describe(base, MoloraConfig(target_modules="all-linear", num_experts=2)).places}
    assert not places & below_positions(base)
    assert {name for name in linears if name.endswith(tuple(mixed or ["\0"]))} <= places


@pytest.mark.parametrize("lengths", [(7, 4, 6), (5,)], ids=["three rows", "one row"])
@pytest.mark.parametrize("case", CASES)
def test_router_losses_of_a_batch_do_not_depend_on_its_padded_width(case, lengths):
    build, batch_of, alone, mixed = CASES[case]
    # Before the convolutions of a layer, which let a row's last frames see what stands behind them.
    others = {
        "ffn1.intermediate_dense",
        "feed_forward.intermediate_dense",
        "linear_q",
        "q_proj",
        "value_proj",
        "in_proj",
    }
    model = adapted(build, alone | mixed | others)
    found = []
    for width in (7, 13):
        tokens, loss = counts(model, batch_of(lengths, width)), router_loss(model).detach()
        found.append((tokens, float(loss)))
    assert found[0][0] and found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)
    assert not any(place.endswith(tuple(alone or ["\0"])) for place in found[0][0])


def test_positions_are_routed_though_nobody_counts_them():
    model = adapted(conformer, {"linear_pos"})
    out = model(**samples((7, 4), 7)).last_hidden_state
    out.sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(
        grad is not None and grad.abs().sum() > 0 for name, grad in trained.items() if "experts" in name
    )
    assert float(router_loss(model)) == 0


def test_layers_inside_larger_models_are_found():
    sizes = {"hidden_size": 32, "speech_encoder_attention_heads": 4}
    attention = SeamlessM4TConformerSelfAttention(SeamlessM4TConfig(**sizes))
    assert below_positions(nn.ModuleDict({"attention": attention})) == {"attention.linear_pos"}
    made = object.__new__(Gemma3nAudioRelativePositionEmbedding)
    nn.Module.__init__(made)
    assert "pos_proj" in below_positions(made)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.of_sum, self.of_count, self.of_size = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, position_embeddings):
        steps = torch.arange(4, dtype=x.dtype).expand(x.shape[0], -1)
        scaled = x * torch.arange(4)
        return self.of_sum(x + position_embeddings) + self.of_count(steps) + self.of_size(scaled)


def test_tokens_with_positions_added_are_tokens():
    assert position_readers(Mixed()) == {"of_count": "positions"}
    assert linear_names(Mixed()) == ["of_sum", "of_size"]


def test_rows_of_positions_cannot_name_their_adapters():
    model = adapted(deberta, {"pos_proj"})
    with pytest.raises(ValueError, match="relative positions, which belong to no row"):
        model.eval()(**text((7, 4), 7), adapter_names=["default", "default"])


def test_groups_of_samples_are_refused_at_relative_positions():
    base = deberta()
    config = RoutedConfig(target_modules=["pos_proj"], num_experts=2, r=2, expert_groups=[0, 1], losses=BALANCING)
    with pytest.raises(ValueError, match="relative positions, which belong to no sample"):
        get_peft_model(base, config)
