"""Modules that a backbone runs in slices count once, with the mask of the positions they read."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Wav2Vec2Config, Wav2Vec2ForCTC

from moe_peft import LoraMoeConfig, RoutedConfig, SiraConfig, router_loss
from moe_peft.telemetry.functions import record
from tests.tiny import padded_batch, tiny_llama

SHARED = {"num_experts": 4, "r": 2, "init_weights": False, "lora_dropout": 0.0}
PLACES = {
    "all": ["intermediate.dense", "output.dense"],
    "first": ["intermediate.dense"],
    # What it reads is no view of the rows.
    "second": ["output.dense"],
}


def bert(chunk):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0}
    config = BertConfig(**sizes, **dropout, num_attention_heads=4, chunk_size_feed_forward=chunk)
    return BertForSequenceClassification(config)


def trained(chunk, targets, router, reentrant=None):
    config = RoutedConfig(
        router=router, target_modules=PLACES[targets], router_aux_loss_coef=0.5, losses={"z_loss": 0.1}, **SHARED
    )
    model = get_peft_model(bert(chunk), config).double().train()
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with record(model) as routings:
        logits = model(**padded_batch([8, 3, 5], seed=2)).logits
        valid = {place: sum(int(made.valid.sum()) for made in all_made) for place, all_made in routings.items()}
    value = router_loss(model).detach()
    logits.square().mean().backward()
    return value, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, valid


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("router", ["top_k", "dense"])
@pytest.mark.parametrize("targets", PLACES)
def test_slices_of_the_feed_forward_count_as_the_rows(targets, router, reentrant):
    value, gradients, valid = trained(0, targets, router)
    for chunk in (2, 4):
        found, found_gradients, found_valid = trained(chunk, targets, router, reentrant)
        torch.testing.assert_close(found, value)
        assert found_valid == valid and found_gradients.keys() == gradients.keys()
        for name, expected in gradients.items():
            torch.testing.assert_close(found_gradients[name], expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: LoraMoeConfig(target_modules=PLACES["all"], **SHARED), "localized_balancing"),
        (lambda: SiraConfig(target_modules=PLACES["all"], top_k=2, **SHARED), "capacity_factor="),
    ],
)
def test_what_slices_cannot_give_is_refused_before_a_step(config, message):
    model = get_peft_model(bert(2), config()).train()
    with pytest.raises(ValueError, match=f"(?s){message}.*chunk_size_feed_forward=0"):
        model(**padded_batch([8, 3]))
    model.eval()(**padded_batch([8, 3]))


class Tiled(nn.Module):
    """An MLP whose output layer is adapted alone and called for three unequal slices."""

    def __init__(self, sizes):
        super().__init__()
        self.up, self.down, self.sizes = nn.Linear(6, 8), nn.Linear(8, 6), sizes

    def forward(self, inputs_embeds, attention_mask=None):
        return torch.cat([self.down(self.up(part).relu()) for part in inputs_embeds.split(self.sizes, dim=1)], dim=1)


def test_a_part_of_the_rows_that_is_not_known_is_refused_where_there_is_padding():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.Linear(6, 6)

        def forward(self, inputs_embeds, attention_mask=None):
            return self.down(inputs_embeds.unflatten(1, (-1, 2)).mean(2))

    model = get_peft_model(Pooled(), RoutedConfig(target_modules=["down"], router_aux_loss_coef=1.0, **SHARED)).train()
    x, mask = torch.randn(2, 8, 6), torch.ones(2, 8)
    model(inputs_embeds=x, attention_mask=mask)
    mask[1, 5:] = 0
    with pytest.raises(ValueError, match="down has read 8 tokens alone, and which ones of the rows is not known"):
        model(inputs_embeds=x, attention_mask=mask)
    model.eval()(inputs_embeds=x, attention_mask=mask)


class Tiles(nn.Module):
    """An MLP that is run for tiles of flattened rows, the first pass of which has no gradient."""

    def __init__(self, size, recomputes):
        super().__init__()
        self.up, self.down, self.size, self.recomputes = nn.Linear(6, 8), nn.Linear(8, 6), size, recomputes

    def mlp(self, x):
        return self.down(self.up(x).relu())

    def forward(self, inputs_embeds, attention_mask=None):
        rows = (inputs_embeds + 0).view(-1, 6)
        if self.recomputes:
            return _Recomputed.apply(rows.requires_grad_(), self).view_as(inputs_embeds)
        return torch.cat([self.mlp(tile) for tile in rows.split(self.size)]).view_as(inputs_embeds)


class _Recomputed(torch.autograd.Function):
    """Runs tiles without gradient, and again with gradient when the backward pass has come."""

    @staticmethod
    def forward(ctx, rows, module):
        ctx.module = module
        ctx.save_for_backward(rows)
        with torch.no_grad():
            return torch.cat([module.mlp(tile) for tile in rows.split(module.size)])

    @staticmethod
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensors
        leaf = rows.detach().requires_grad_()
        with torch.enable_grad():
            for tile, own in zip(leaf.split(ctx.module.size), grad.split(ctx.module.size), strict=True):
                torch.autograd.backward(ctx.module.mlp(tile), own)
        return leaf.grad, None


@pytest.mark.parametrize("targets", [["up", "down"], ["down"]])
def test_tiles_of_flattened_rows_count_as_the_rows(targets):
    found = []
    for size, recomputes in ((14, False), (4, False), (7, True), (4, True)):
        torch.manual_seed(1)
        config = RoutedConfig(target_modules=targets, router_aux_loss_coef=1.0, losses={"z_loss": 0.5}, **SHARED)
        model = get_peft_model(Tiles(size, recomputes), config).double().train()
        torch.manual_seed(2)
        mask = torch.tensor([[1] * 7, [1] * 3 + [0] * 4])
        out = model(inputs_embeds=torch.randn(2, 7, 6).double(), attention_mask=mask)
        value = router_loss(model).detach()
        out.square().sum().backward()
        found.append((value, [p.grad for p in model.parameters() if p.grad is not None]))
    for value, gradients in found[1:]:
        torch.testing.assert_close(value, found[0][0])
        torch.testing.assert_close(gradients, found[0][1])


def test_slices_of_any_length_join():
    values = []
    for sizes in (7, [3, 3, 1]):
        torch.manual_seed(1)
        config = RoutedConfig(target_modules=["down"], router_aux_loss_coef=1.0, **SHARED)
        model = get_peft_model(Tiled(sizes), config).double().train()
        torch.manual_seed(2)
        model(inputs_embeds=torch.randn(2, 7, 6).double())
        values.append(router_loss(model).detach())
    torch.testing.assert_close(values[1], values[0])


def test_a_head_that_reads_the_last_positions_sees_their_mask():
    config = RoutedConfig(target_modules=["lm_head"], **SHARED)
    model, batch = get_peft_model(tiny_llama(), config).train(), padded_batch([6, 3])
    with record(model) as routings:
        model(**batch, logits_to_keep=4)
    assert torch.equal(routings["lm_head"][0].valid, batch["attention_mask"][:, -4:].reshape(-1).bool())


def test_frames_of_sound_have_the_mask_of_their_samples():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    convolutions = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    layout = {"feat_extract_norm": "layer", "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    dropout = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0, "apply_spec_augment": False}
    base = Wav2Vec2ForCTC(Wav2Vec2Config(**sizes, **convolutions, **layout, **dropout, vocab_size=20))
    config = RoutedConfig(target_modules=["q_proj", "intermediate_dense", "projection", "lm_head"], **SHARED)
    model = get_peft_model(base, config).train()
    mask = torch.ones(2, 400, dtype=torch.long)
    mask[1, 150:] = 0
    with record(model) as routings:
        model(input_values=torch.randn(2, 400), attention_mask=mask)
    frames = [int(base._get_feat_extract_output_lengths(torch.tensor(n))) for n in (400, 150)]
    assert len(routings) == 6
    for (made,) in routings.values():
        assert made.valid.view(2, -1).sum(1).tolist() == frames and frames[0] > frames[1]
