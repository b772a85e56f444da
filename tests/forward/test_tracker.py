"""What layers learn about a forward pass: masks, sequences, groups, for every way a batch can arrive."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import torch
from peft import get_peft_model
from torch import nn

from moe_peft import LoraMoeConfig, MoePeftWarning, RoutedConfig, SiraConfig, router_loss
from moe_peft.forward.tracker import TRACKER_ATTRIBUTE, find_stacks, find_tracker, in_backward
from moe_peft.layers import RoutedLayer
from moe_peft.telemetry.functions import record
from tests.tiny import (
    OneLinear,
    adapted_linear,
    padded_batch,
    routed_layer_of,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
)

GROUPED = {"num_experts": 2, "expert_groups": [1, 0]}


def llama(**kwargs):
    config = LoraMoeConfig(num_experts=2, target_modules=["up_proj"], init_weights=False, **kwargs)
    return get_peft_model(tiny_llama(), config).train()


def contexts(model, **batch):
    """The context each place saw in one forward."""
    with record(model) as routings:
        model(**batch)
    assert all(len(made) == 1 for made in routings.values())
    return {place: made[0].context for place, made in routings.items()}


def only(found):
    """The context of all places, which must be the same object."""
    first, *others = found.values()
    assert all(other is first for other in others)
    return first


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_marked_and_rows_are_sequences(side):
    batch = padded_batch([3, 5, 1], side=side)
    context = only(contexts(llama(), **batch))
    assert torch.equal(context.valid.view(3, 5), batch["attention_mask"].bool())
    assert context.sequences.tolist() == [0] * 5 + [1] * 5 + [2] * 5 and context.num_sequences == 3
    assert context.training and context.groups is None


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert])
def test_masks_arrive_on_every_architecture(make):
    model = get_peft_model(make(), LoraMoeConfig(num_experts=2)).train()
    batch = padded_batch([3, 5])
    found = contexts(model, **batch)
    assert len(found) in (4, 6)
    assert all(torch.equal(c.valid.view(2, 5), batch["attention_mask"].bool()) for c in found.values())


def test_inputs_by_position_are_understood():
    batch = padded_batch([3, 5])
    model = llama()
    with record(model) as routings:
        model.base_model.model.model(batch["input_ids"], batch["attention_mask"])
    (made, _) = routings.values()
    assert torch.equal(made[0].context.valid.view(2, 5), batch["attention_mask"].bool())


def test_without_a_mask_every_token_counts():
    assert only(contexts(llama(), input_ids=padded_batch([5, 5])["input_ids"])).valid is None


def test_embeddings_instead_of_ids_are_understood():
    context = only(contexts(llama(), inputs_embeds=torch.randn(2, 5, 32), attention_mask=torch.ones(2, 5)))
    assert context.valid.shape == (10,) and context.num_sequences == 2


def test_longer_cached_mask_is_cut_to_the_last_tokens():
    model = llama().eval()
    batch = padded_batch([3, 5], side="left")
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        mask = torch.cat([batch["attention_mask"], torch.tensor([[1], [0]])], dim=1)
        context = only(contexts(model, input_ids=torch.tensor([[7], [8]]), attention_mask=mask, past_key_values=cache))
    assert context.valid.tolist() == [True, False]


def test_four_dimensional_masks_are_left_out_of_the_counts():
    mask = torch.zeros(2, 1, 5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    assert only(contexts(llama(), input_ids=padded_batch([5, 5])["input_ids"], attention_mask=mask)).valid is None


class Flattening(nn.Module):
    """Hands its layer all rows as one, as the experts of sparse models receive them."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(7, 5)

    def forward(self, inputs_embeds, attention_mask=None, seq_idx=None):
        return self.linear(inputs_embeds.reshape(-1, 7))


@pytest.mark.parametrize("packed", [False, True])
def test_flattened_rows_have_the_contexts_of_the_rows(packed):
    model = get_peft_model(Flattening(), LoraMoeConfig(num_experts=2, target_modules=["linear"])).train()
    batch = {"attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])}
    expected = [0] * 4 + [1] * 4
    if packed:
        batch["seq_idx"] = torch.tensor([[0, 0, 1, 1], [0, 1, 2, 2]])
        expected = [0, 0, 1, 1, 2, 3, 4, 4]
    context = only(contexts(model, inputs_embeds=torch.randn(2, 4, 7), **batch))
    assert context.sequences.tolist() == expected and context.num_sequences == max(expected) + 1
    assert context.valid.tolist() == [True] * 3 + [False] + [True] * 4


def test_a_plain_matrix_of_tokens_is_one_sequence():
    context = only(contexts(adapted_linear(LoraMoeConfig(num_experts=2)), x=torch.randn(6, 7).double()))
    assert context.sequences is None and context.num_sequences == 1 and context.valid is None


def test_any_leading_shape_keeps_its_rows():
    model = adapted_linear(LoraMoeConfig(num_experts=2))
    assert only(contexts(model, x=torch.randn(2, 3, 4, 7).double())).sequences.tolist() == [0] * 12 + [1] * 12
    assert model(torch.randn(2, 3, 4, 7).double()).shape == (2, 3, 4, 5)
    assert model(torch.randn(7).double()).shape == (5,)


SEQ_IDX = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 1]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]])
DOCUMENTS = [0, 0, 0, 1, 1, 2, 3, 4, 4, 4, 4, 4]


@pytest.mark.parametrize("packing", [{"seq_idx": SEQ_IDX}, {"position_ids": POSITIONS}])
def test_documents_of_packed_rows_are_sequences(packing):
    context = only(contexts(llama(), input_ids=padded_batch([6, 6])["input_ids"], **packing))
    assert context.sequences.tolist() == DOCUMENTS and context.num_sequences == 5


def test_positions_of_plain_rows_make_one_sequence_per_row():
    positions = torch.arange(6).expand(2, 6)
    context = only(contexts(llama(), input_ids=padded_batch([6, 6])["input_ids"], position_ids=positions))
    assert context.sequences.tolist() == [0] * 6 + [1] * 6


def test_positions_beside_a_mask_are_those_of_padding():
    batch = padded_batch([3, 6], side="left")
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    context = only(contexts(llama(), **batch, position_ids=positions))
    assert context.sequences.tolist() == [0] * 6 + [1] * 6


@pytest.mark.parametrize(
    "make",
    [
        lambda: LoraMoeConfig(num_experts=3, router_z_loss_coef=0.1),
        lambda: SiraConfig(num_experts=3, top_k=2, expert_dropout=0.0, router_z_loss_coef=0.1),
    ],
)
def test_router_losses_of_packed_documents_equal_those_of_padded_rows(make):
    model = adapted_linear(make())
    x = torch.randn(1, 6, 7, dtype=torch.float64)
    model(x=x, seq_idx=torch.tensor([[0, 0, 0, 0, 1, 1]]))
    packed = router_loss(model)
    rows = torch.zeros(2, 4, 7, dtype=torch.float64)
    rows[0], rows[1, :2] = x[0, :4], x[0, 4:]
    model(x=rows, attention_mask=torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]))
    torch.testing.assert_close(router_loss(model), packed)


def test_groups_per_row():
    model = llama(expert_groups=[1, 0])
    context = only(contexts(model, **padded_batch([3, 5, 2]), task_type=torch.tensor([1, 0, 1])))
    assert context.groups.tolist() == [1, 0, 1]


def test_groups_per_document_and_per_token_of_packed_rows():
    model = llama(expert_groups=[1, 0])
    batch = {"input_ids": padded_batch([6, 6])["input_ids"], "seq_idx": SEQ_IDX}
    per_document = torch.tensor([1, 0, 1, 1, 0])
    per_token = per_document[torch.tensor(DOCUMENTS)].view(2, 6)
    for groups in (per_document, per_token):
        assert only(contexts(model, **batch, task_type=groups)).groups.tolist() == [1, 0, 1, 1, 0]


def test_groups_may_be_a_list_under_another_name():
    model = llama(expert_groups=[1, 0], group_column="domain")
    assert only(contexts(model, **padded_batch([3, 5]), domain=[1, 0])).groups.tolist() == [1, 0]


def test_groups_of_another_shape_are_refused_with_both_shapes():
    model = llama(expert_groups=[1, 0])
    message = r"sample groups of shape \(2,\), but it holds 3 sequences in rows of shape \(3, 5\)"
    with pytest.raises(ValueError, match=message):
        model(**padded_batch([3, 5, 2]), task_type=torch.tensor([1, 0]))


def test_groups_that_no_expert_serves_are_refused_by_name():
    model = llama(expert_groups=[1, 0])
    with pytest.raises(ValueError, match=r"column 'task_type' holds the sample groups \[7\].*known are \[0, 1\]"):
        model(**padded_batch([3, 5]), task_type=torch.tensor([1, 7]))


def test_a_batch_without_groups_is_refused_in_training_and_served_in_evaluation():
    model = llama(expert_groups=[1, 0])
    with pytest.raises(ValueError, match="needs the group of every sample, but the batch has no column 'task_type'"):
        model(**padded_batch([3, 5]))
    with torch.no_grad():
        model(**padded_batch([3, 5]))
    assert model.eval()(**padded_batch([3, 5])).logits.isfinite().all()


@pytest.mark.parametrize("groups", [None, [None, None], [7, 7], ["law", "code"], torch.tensor([0.5, 1.0]), [0]])
def test_evaluation_does_not_look_at_groups(groups):
    """There is no router loss in evaluation, and nothing else reads them."""
    model = llama(expert_groups=[1, 0]).eval()
    batch = padded_batch([3, 5])
    expected = model(**batch).logits
    with record(model) as routings:
        torch.testing.assert_close(model(**batch, task_type=groups).logits, expected)
    assert only({place: made[0].context for place, made in routings.items()}).groups is None
    with torch.no_grad():
        assert model.train()(**batch, task_type=groups).logits.shape == expected.shape


def test_who_watches_an_evaluation_sees_its_groups():
    model = llama(expert_groups=[1, 0]).eval()
    with record(model) as routings:
        model(**padded_batch([3, 5]), task_type=torch.tensor([1, 0]))
    assert all(made[0].context.groups.tolist() == [1, 0] for made in routings.values())


@pytest.mark.parametrize("groups", [[None, 1], ["law", "code"], torch.tensor([0.0, 1.0]), [True, False]])
def test_groups_that_are_no_integers_are_refused_in_training(groups):
    with pytest.raises(ValueError, match="'task_type' must hold the group of every sample as an integer"):
        llama(expert_groups=[1, 0])(**padded_batch([3, 5]), task_type=groups)


def test_groups_of_one_batch_do_not_serve_the_next():
    model = llama(expert_groups=[1, 0])
    model(**padded_batch([3, 5]), task_type=torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="needs the group of every sample"):
        model(**padded_batch([3, 5]))


def test_an_error_in_a_forward_leaves_no_pass_open():
    model = adapted_linear(LoraMoeConfig(num_experts=2))
    tracker = find_tracker(model)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 3).double())
    assert tracker.current is None
    with pytest.warns(MoePeftWarning, match="outside a forward of its model"):
        routed_layer_of(model)(torch.randn(2, 7).double())
    assert tracker.latest is None or not tracker.latest.layers


def test_t5_places_see_the_mask_of_the_tokens_they_read():
    config = LoraMoeConfig(num_experts=2, target_modules=["q", "k", "v", "wi_0"])
    model = get_peft_model(tiny_t5(), config).train()
    batch = padded_batch([3, 6], seed=1)
    target = padded_batch(
        [
            4,
            2,
        ],
        seed=2,
    )
    found = contexts(
        model,
        **batch,
        decoder_input_ids=target["input_ids"],
        decoder_attention_mask=target["attention_mask"],
    )
    source, own = (part["attention_mask"].reshape(-1).bool() for part in (batch, target))
    assert len(found) == 2 * 4 + 2 * 7
    for place, context in found.items():
        reads_source = place.startswith("encoder") or place.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        assert torch.equal(context.valid, source if reads_source else own), place
        assert context.num_sequences == 2 and context.training


def test_t5_router_loss_is_that_of_encoder_and_decoder_together():
    batch = {**padded_batch([3, 6], seed=1), "labels": padded_batch([4, 4], seed=2)["input_ids"]}
    parts = []
    for targets in (r"encoder.*wi_0", r"decoder.*wi_0", r".*wi_0"):
        config = LoraMoeConfig(num_experts=2, target_modules=targets, lora_dropout=0.0)
        model = get_peft_model(tiny_t5(), config).train()
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, RoutedLayer):
                    module.router["default"].weight.copy_(torch.arange(64.0).view(2, 32) / 64)
        model(**batch)
        parts.append(router_loss(model).detach())
        assert parts[-1] > 0
    torch.testing.assert_close(parts[0] + parts[1], parts[2])


@pytest.mark.parametrize("reentrant", [False, True])
def test_t5_gradients_are_the_same_under_checkpointing(reentrant):
    batch = {**padded_batch([3, 6], seed=1), "labels": padded_batch([4, 4], seed=2)["input_ids"]}
    found = []
    for checkpointing in (False, True):
        config = LoraMoeConfig(num_experts=2, init_weights=False, lora_dropout=0.0, target_modules=["q", "k", "wi_0"])
        model = get_peft_model(tiny_t5(), config).double().train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**batch, use_cache=False).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-5, atol=1e-9)


def test_stacks_are_encoder_and_decoder_or_the_backbone_or_the_model():
    t5, bert, plain = tiny_t5(), tiny_bert(), OneLinear(3, 3)
    assert find_stacks(t5) == [t5.encoder, t5.decoder]
    assert find_stacks(bert) == [bert.bert]
    assert find_stacks(plain) == [plain]


def test_in_backward_is_true_only_while_gradients_are_computed():
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: seen.append(in_backward()))
    y.sum().backward()
    assert seen == [True] and not in_backward()


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@pytest.mark.parametrize("trained", [False, True])
def test_a_copy_computes_the_same_and_tracks_on_its_own(duplicate, trained):
    model = llama(expert_groups=[1, 0], lora_dropout=0.0)
    batch = {**padded_batch([3, 5]), "task_type": torch.tensor([1, 0])}
    if trained:
        model(**batch).logits.sum().backward()
    twin = duplicate(model)
    tracker = find_tracker(twin)
    assert tracker is not find_tracker(model)
    assert all(m.tracker is tracker for m in twin.modules() if isinstance(m, RoutedLayer))
    assert tracker.latest is None
    model.zero_grad()
    twin.zero_grad()
    before = find_tracker(model).latest
    twin(**batch).logits.sum().backward()
    assert find_tracker(model).latest is before and tracker.latest is not None
    model(**batch).logits.sum().backward()
    assert torch.equal(router_loss(twin), router_loss(model))
    for (name, one), (_, two) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None) and (one.grad is None or torch.equal(one.grad, two.grad)), name


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("make", [tiny_llama, tiny_t5])
def test_unload_leaves_no_hooks(make):
    base = make()
    before = hooks_of(base)
    model = get_peft_model(base, LoraMoeConfig(num_experts=2))
    assert hooks_of(base) > before and find_tracker(model) is not None
    plain = model.unload()
    assert hooks_of(plain) == before
    assert find_tracker(plain) is None and not hasattr(plain, TRACKER_ATTRIBUTE)


def test_deleting_one_adapter_leaves_the_tracker_to_the_other():
    model = llama()
    model.add_adapter("second", LoraMoeConfig(num_experts=3, target_modules=["up_proj"]))
    model.delete_adapter("default")
    model.set_adapter("second")
    assert only(contexts(model, **padded_batch([3, 5]))).training


def test_passes_of_past_steps_are_released():
    model = llama(lora_dropout=0.0)
    tracker = find_tracker(model)
    passes = []
    tracker.observers.append(lambda place, adapter, routing: passes.append(weakref.ref(tracker.current)))
    for _ in range(4):
        model.zero_grad()
        model(**padded_batch([3, 5])).logits.sum().backward()
    gc.collect()
    alive = {id(found) for found in (ref() for ref in passes) if found is not None}
    assert len(passes) == 8 and len(alive) <= 1


def test_one_vector_per_row_counts_as_a_sequence_each():
    """A pooled token reaches a layer as (B, D): with groups, every row keeps its own."""
    config = LoraMoeConfig(task_type="SEQ_CLS", num_experts=4, expert_groups=[0, 0, 1, 1], target_modules="all-linear")
    model = get_peft_model(tiny_bert(), config).train()
    with record(model) as routings:
        model(**padded_batch([6, 4, 5]), task_type=torch.tensor([0, 1, 1]))
    (pooled,) = routings["bert.pooler.dense"]
    assert pooled.context.num_sequences == 3 and pooled.context.valid is None
    assert torch.equal(pooled.context.groups, torch.tensor([0, 1, 1]))


def test_a_pooled_token_has_the_id_of_the_first_token_of_its_row():
    config = RoutedConfig(task_type="SEQ_CLS", num_experts=4, scorer="token_hash", target_modules="all-linear")
    model, batch = get_peft_model(tiny_bert(), config).eval(), padded_batch([6, 4, 5])
    with record(model) as routings:
        model(**batch)
    (pooled,), (within, *_) = routings["bert.pooler.dense"], routings["bert.encoder.layer.0.attention.self.query"]
    assert torch.equal(pooled.context.token_ids, batch["input_ids"][:, 0])
    assert torch.equal(within.context.token_ids, batch["input_ids"].reshape(-1))
