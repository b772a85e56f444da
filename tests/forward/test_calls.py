"""Calls of a model however they are made: past the hooks, nested, in a backward pass, recomputed, interrupted."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_peft import LoraMoeConfig, RoutedConfig, SiraConfig, router_loss
from moe_peft.forward.tracker import find_tracker, find_trackers
from moe_peft.layers import RoutedLayer
from moe_peft.telemetry.functions import record
from tests.tiny import padded_batch, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

CONFIGS = {
    "top_k": lambda: RoutedConfig(num_experts=4, router_aux_loss_coef=0.5, losses={"z_loss": 0.1}, **SHARED),
    "capacity": lambda: SiraConfig(num_experts=4, top_k=2, capacity_factor=0.5, **SHARED),
    "groups": lambda: LoraMoeConfig(num_experts=4, expert_groups=[0, 1, 1, 0], router_aux_loss_coef=0.5, **SHARED),
}
SHARED = {"r": 2, "init_weights": False, "lora_dropout": 0.0}
KINDS = list(CONFIGS)


def adapted(kind="top_k", base=None, reentrant=None):
    config = CONFIGS[kind]()
    if kind == "capacity":
        config.expert_dropout = 0.0
    model = get_peft_model(tiny_llama(seed=3) if base is None else base, config).double().train()
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


def batch_of(kind="top_k", lengths=(6, 3, 5), seed=1):
    batch = padded_batch(list(lengths), seed=seed)
    if kind == "groups":
        batch["task_type"] = torch.tensor([0, 1, 0])
    return batch


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def stepped(model, call):
    """Gradients of one backward pass, and the value of the router losses."""
    model.zero_grad()
    loss = call()
    value = router_loss(model).detach()
    loss.backward()
    return gradients(model), value


def assert_same(found, expected):
    (grads, value), (other_grads, other_value) = found, expected
    torch.testing.assert_close(value, other_value)
    assert value > 0 and grads.keys() == other_grads.keys()
    for name, gradient in other_grads.items():
        torch.testing.assert_close(grads[name], gradient, rtol=1e-6, atol=1e-12, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("base", [tiny_llama, tiny_gpt2, tiny_bert])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_taken_by_itself_is_a_call(kind, base):
    model, batch = adapted(kind, base()), batch_of(kind)
    inner = model.get_base_model()
    expected = stepped(model, lambda: model(**batch).logits.square().mean())
    assert_same(stepped(model, lambda: inner.forward(**batch).logits.square().mean()), expected)
    assert not find_tracker(model)._thread.calls


def test_forward_of_a_backbone_without_a_head_is_a_call():
    """As sentence-transformers runs the models it holds."""
    base = tiny_bert().bert
    model, batch = adapted("top_k", base), batch_of()
    expected = stepped(model, lambda: model(**batch).last_hidden_state.square().mean())
    forward = getattr(base, "forward")  # noqa: B009, as those callers write it
    assert_same(stepped(model, lambda: forward(**batch)[0].square().mean()), expected)


def test_a_forward_that_is_replaced_is_still_a_call():
    """Trainers put a forward of their own on the model, which calls the backbone."""
    model, batch = adapted("groups"), batch_of("groups")
    inner = model.get_base_model()
    expected = stepped(model, lambda: model(**batch).logits.square().mean())

    def fused(input_ids, attention_mask):
        return inner.lm_head(inner.model(input_ids=input_ids, attention_mask=attention_mask)[0])

    inner.forward = fused
    assert_same(stepped(model, lambda: inner(**batch).square().mean()), expected)


def test_a_forward_of_the_models_own_is_kept_and_comes_back():
    base = tiny_llama()
    base.forward = own = lambda input_ids: type(base).forward(base, input_ids)
    model = adapted("top_k", base)
    with record(model) as routings:
        model(padded_batch([3, 5])["input_ids"])
    assert len(routings) == 6
    assert model.unload().forward is own


def test_wrapped_and_bound_once_more_a_forward_is_the_same():
    model, batch = adapted(), batch_of()
    inner = model.get_base_model()
    expected = inner.forward(**batch).logits
    bound = inner.forward.__get__(inner) if hasattr(inner.forward, "__get__") else inner.forward
    torch.testing.assert_close(bound(inner, **batch).logits, expected)


def test_trackers_are_found_anywhere_and_losses_of_several_add_up():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(adapted("top_k", tiny_bert().bert).get_base_model())
            self.second = nn.ModuleDict({"inner": adapted("capacity", tiny_llama().model)})

    both = Two().double()
    assert len(find_trackers(both)) == 2 and find_tracker(both) is find_trackers(both)[0]
    batch, parts = batch_of(), []
    for model in (both.first[0], both.second["inner"]):
        model.forward(**batch)[0].sum().backward()
        parts.append(router_loss(model).detach())
    both.zero_grad()
    with record(both) as routings:
        both.first[0](**batch)
        both.second["inner"](**batch)
    assert any("layers.0" in place for place in routings) and any("encoder.layer.0" in place for place in routings)
    torch.testing.assert_close(router_loss(both).detach(), sum(parts))


def test_an_adapter_around_an_adapted_model_tracks_its_own_places():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = adapted("top_k", tiny_llama()).get_base_model()
            self.up = nn.Linear(64, 5)

        def forward(self, **batch):
            return self.up(self.inner(**batch).logits)

    config = CONFIGS["top_k"]()
    config.target_modules = ["up"]
    model = get_peft_model(Around(), config, adapter_name="around").double().train()
    assert len(find_trackers(model)) == 2
    with record(model) as routings:
        model(**batch_of())
    assert routings["up"][0].context.training and routings["up"][0].valid is not None


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_without_gradient_inside_a_forward_changes_nothing(kind, reentrant):
    model, batch = adapted(kind, reentrant=reentrant), batch_of(kind)
    expected = stepped(model, lambda: model(**batch, use_cache=False).logits.square().mean())
    inside = []

    def probe(module, args, output):
        if not inside:
            inside.append(1)
            with torch.no_grad():
                model(input_ids=batch["input_ids"][:1, :4])
            inside.clear()

    model.base_model.model.model.layers[0].mlp.register_forward_hook(probe)
    assert_same(stepped(model, lambda: model(**batch, use_cache=False).logits.square().mean()), expected)


def test_a_forward_inside_a_forward_in_evaluation_leaves_the_outer_context():
    model, batch = adapted().eval(), batch_of()
    inside = []

    def probe(module, args, output):
        if not inside:
            inside.append(1)
            model(**padded_batch([2, 4]))

    layers = [module for module in model.modules() if isinstance(module, RoutedLayer)]
    layers[2].register_forward_hook(probe)
    with record(model) as routings:
        model(**batch)
    valid = batch["attention_mask"].reshape(-1).bool()
    for made in routings.values():
        assert sorted(len(routing.valid) for routing in made) == [8, 18]
        assert any(torch.equal(routing.valid, valid) for routing in made)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_trained_forward_inside_a_forward_keeps_both_masks(reentrant):
    model, batch, other = adapted(reentrant=reentrant), batch_of(), batch_of(lengths=(2, 4), seed=5)

    def nested(inner_loss):
        extra = []

        def probe(module, args, output):
            if not extra:
                extra.append(None)
                extra[0] = inner_loss()

        handle = model.base_model.model.model.layers[1].register_forward_pre_hook(
            lambda module, args: probe(module, args, None)
        )
        try:
            loss = model(**batch, use_cache=False).logits.square().mean()
        finally:
            handle.remove()
        return loss + extra[0]

    model.zero_grad()
    nested(lambda: model(**other, use_cache=False).logits.square().mean()).backward()
    found = gradients(model)
    alone = [
        stepped(model, lambda own=own: model(**own, use_cache=False).logits.square().mean()) for own in (batch, other)
    ]
    for name, grad in found.items():
        torch.testing.assert_close(grad, alone[0][0][name] + alone[1][0][name], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_inside_a_backward_that_repeats_nothing_is_one_of_its_own(kind, reentrant):
    """Losses that cache gradients run the forwards that they differentiate in a hook of the loss."""
    model, batch = adapted(kind, reentrant=reentrant), batch_of(kind)
    with torch.no_grad():
        leaf = model(**batch, use_cache=False).logits.clone().requires_grad_()
    (at_leaf,) = torch.autograd.grad(leaf.square().mean(), leaf)
    direct = stepped(model, lambda: (model(**batch, use_cache=False).logits * at_leaf).sum())
    model.zero_grad()
    loss, values = leaf.square().mean(), []

    def replay(grad):
        with torch.enable_grad():
            logits = model(**batch, use_cache=False).logits
            values.append(router_loss(model).detach())
            (logits * at_leaf).sum().backward()

    loss.register_hook(replay)
    loss.backward()
    assert_same((gradients(model), values[0]), direct)


def test_a_forward_inside_the_backward_of_a_training_forward_is_one_of_its_own():
    model, batch, other = adapted(), batch_of(), batch_of(lengths=(2, 4), seed=5)
    expected = []
    for own in (batch, other):
        model.zero_grad()
        model(**own).logits.square().mean().backward()
        expected.append(gradients(model))
    model.zero_grad()
    logits, done = model(**batch).logits, []

    def hook(grad):
        if not done:
            done.append(1)
            with torch.enable_grad():
                model(**other).logits.square().mean().backward()

    logits.register_hook(hook)
    logits.square().mean().backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[0][name] + expected[1][name], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_recomputed_as_a_whole_is_measured_once(kind, reentrant):
    model, batch = adapted(kind), batch_of(kind)
    groups = {name: value for name, value in batch.items() if name == "task_type"}
    embeddings = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()

    def run(embeds):
        return model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], use_cache=False, **groups).logits

    expected = stepped(model, lambda: run(embeddings).square().mean())
    with record(model) as routings:
        found = stepped(model, lambda: checkpoint(run, embeddings, use_reentrant=reentrant).square().mean())
    assert_same(found, expected)
    assert routings and all(len(made) == 1 for made in routings.values())


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, RuntimeError])
@pytest.mark.parametrize("base", [tiny_llama, tiny_t5])
def test_whatever_ends_a_forward_leaves_nothing_of_it(kind, base):
    model = adapted("groups", base())
    batch = batch_of("groups")
    if base is tiny_t5:
        batch["labels"] = batch["input_ids"]
    layer = [module for module in model.modules() if isinstance(module, RoutedLayer)][-2]

    def stop(*args):
        raise kind

    for call in (model, model.get_base_model(), model.get_base_model().forward):
        handle = layer.register_forward_hook(stop)
        with pytest.raises(kind):
            call(**batch)
        handle.remove()
        tracker = find_tracker(model)
        assert tracker.current is None and not tracker._thread.calls and not tracker._busy
        with pytest.raises(ValueError, match="needs the group of every sample"):
            model(**{name: value for name, value in batch.items() if name != "task_type"})
        model(**batch)


def test_an_interrupt_before_a_replaced_forward_is_forgotten_at_the_next_call():
    model, batch = adapted("groups"), batch_of("groups")
    inner = model.get_base_model()

    def interrupted(**kwargs):
        raise KeyboardInterrupt

    inner.forward = interrupted
    with pytest.raises(KeyboardInterrupt):
        inner(**batch)
    del inner.forward
    with pytest.raises(ValueError, match="needs the group of every sample"):
        inner(**{name: value for name, value in batch.items() if name != "task_type"})


def test_entries_are_gone_after_unload_whoever_wrapped_them():
    model = adapted()
    inner = model.get_base_model()
    entry = inner.forward
    inner.forward = lambda **kwargs: entry(**kwargs)
    plain = model.unload()
    assert plain(**batch_of()).logits.shape == (3, 6, 64)
    assert find_tracker(plain) is None and not plain._forward_hooks and not plain._forward_pre_hooks
