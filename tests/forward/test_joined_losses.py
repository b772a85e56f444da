"""Losses of joined sums: the loss of the joined batch, and the gradient of it in each part."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_peft import RoutedConfig
from moe_peft.forward.joined_losses import ForwardLosses, LayerLosses, WindowSums, differentiate, finish
from moe_peft.forward.objective import MeanLoss
from moe_peft.losses import LOSSES, LocalizedBalancing
from moe_peft.types import LossScale, RouterLoss, Routing, TokenContext
from tests.compare import random_routing

# Losses of any decision: what a selector alone brings, the laws of parts give to the losses that read it.
NAMES = sorted(name for name, loss in LOSSES.items() if loss.needs <= {"selection"})
GROUPS = [0, 1, 1, 0]


def loss_of(name: str) -> RouterLoss:
    return LocalizedBalancing(expert_groups=GROUPS, delta=0.3) if name == "localized_balancing" else LOSSES[name]()


def batch(lengths, groups, top_k, seed) -> Routing:
    """A routing of float64 whose last token of every sequence but the first is padding."""
    sequences = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    valid = torch.ones(len(sequences), dtype=torch.bool)
    valid[torch.tensor(lengths).cumsum(0)[1:] - 1] = False
    context = TokenContext(True, valid, sequences, len(lengths), torch.tensor(groups))
    torch.manual_seed(seed)
    return random_routing(len(sequences), 4, top_k, context=context)


def joined(first: Routing, second: Routing) -> Routing:
    one, two = first.context, second.context
    context = replace(
        one,
        valid=torch.cat([one.valid, two.valid]),
        sequences=torch.cat([one.sequences, two.sequences + one.num_sequences]),
        num_sequences=one.num_sequences + two.num_sequences,
        groups=torch.cat([one.groups, two.groups]),
    )
    experts = None if first.experts is None else torch.cat([first.experts, second.experts])
    parts = {n: torch.cat([getattr(first, n), getattr(second, n)]) for n in ("weights", "logits", "probs")}
    return Routing(experts=experts, context=context, **parts)


def two_batches(top_k):
    return batch([5, 4, 2], [0, 1, 1], top_k, seed=1), batch([3, 7], [1, 0], top_k, seed=2)


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("name", NAMES)
def test_value_of_added_sums_is_the_loss_of_the_joined_batch(name, top_k):
    loss = loss_of(name)
    first, second = two_batches(top_k)
    torch.testing.assert_close(loss.value(loss.sums(first) + loss.sums(second)), loss(joined(first, second)))


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("name", NAMES)
def test_mean_of_the_parts_gradients_is_the_gradient_of_the_joined_batch(name, top_k):
    loss = loss_of(name)
    parts = two_batches(top_k)
    whole = [r.logits for r in parts]
    expected = torch.autograd.grad(loss(joined(*parts)), whole, retain_graph=True, materialize_grads=True)
    sums = [loss.sums(routing) for routing in parts]
    for number, logits in enumerate(whole):
        layer = LayerLosses({name: loss}, {name: 1.0}, "global_batch", {name: sums[number].detach()})
        layer.joined, layer.count = {name: (sums[0] + sums[1]).detach()}, 2
        differentiate([layer])
        (found,) = torch.autograd.grad(
            sums[number], [logits], layer.gradients[name], retain_graph=True, allow_unused=True, materialize_grads=True
        )
        torch.testing.assert_close(found / 2, expected[number])


def measured(name, routing, scope="accumulation_window", coefficient=0.5) -> LayerLosses:
    loss = loss_of(name)
    return LayerLosses({name: loss}, {name: coefficient}, scope, {name: loss.sums(routing).detach()})


@pytest.mark.parametrize("name", NAMES)
def test_window_joins_the_micro_batches_so_far_and_weighs_by_their_number(name):
    first, second = two_batches(2)
    window = WindowSums()
    one, two = measured(name, first), measured(name, second)
    finish({("up", "default", 0): one}, window)
    finish({("up", "default", 0): two}, window)
    torch.testing.assert_close(two.losses[name].value(two.joined[name]), loss_of(name)(joined(first, second)))
    assert (one.count, two.count) == (1, 2)
    leaf = (one.own[name] + two.own[name]).requires_grad_()
    (expected,) = torch.autograd.grad(0.5 * loss_of(name).value(leaf), leaf)
    torch.testing.assert_close(two.gradients[name], 2 * expected)
    other = measured(name, second)
    finish({("down", "default", 0): other}, window)
    assert other.count == 1


@pytest.mark.parametrize("scope", ["micro_batch", "global_batch"])
def test_other_scopes_leave_the_window_alone(scope):
    window = WindowSums()
    for _ in range(2):
        layer = measured("importance", two_batches(2)[0], scope=scope)
        finish({("up", "default", 0): layer}, window)
        assert layer.count == 1 and not window.sums


def test_layers_of_several_kinds_and_sizes_are_differentiated_each_on_its_own():
    routings = [random_routing(7, experts, 2) for experts in (4, 4, 6)]
    layers = []
    for number, routing in enumerate(routings):
        losses = {"z_loss": LOSSES["z_loss"](), "load_balancing": LOSSES["load_balancing"]()}
        own = {name: loss.sums(routing).detach() for name, loss in losses.items()}
        layers.append(LayerLosses(losses, {"z_loss": 0.1 + number, "load_balancing": 0.2}, "micro_batch", own))
    finish({("layer", "default", number): layer for number, layer in enumerate(layers)}, None)
    for layer in layers:
        for name, sums in layer.own.items():
            leaf = sums.clone().requires_grad_()
            (expected,) = torch.autograd.grad(layer.coefficients[name] * layer.losses[name].value(leaf), leaf)
            torch.testing.assert_close(layer.gradients[name], expected)


def test_a_plain_function_is_averaged_over_what_is_joined():
    loss = MeanLoss(lambda routing: routing.probs.square().sum())
    first, second = two_batches(2)
    expected = (first.probs.square().sum() + second.probs.square().sum()) / 2
    torch.testing.assert_close(loss.value(loss.sums(first) + loss.sums(second)), expected)


class SharedLayer(nn.Module):
    """One linear layer at two depths, as models with shared layers have it."""

    def __init__(self, checkpointing: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.checkpointing = checkpointing

    def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            if self.checkpointing:
                inputs_embeds = checkpoint(self._block, inputs_embeds, use_reentrant=self.reentrant)
            else:
                inputs_embeds = self._block(inputs_embeds)
        return inputs_embeds

    def _block(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_calls_of_a_shared_layer_find_what_they_measured(reentrant):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        base = SharedLayer(checkpointing)
        base.reentrant = reentrant
        config = RoutedConfig(
            num_experts=4,
            target_modules=["linear"],
            init_weights=False,
            router_aux_loss_coef=1.0,
            losses={"z_loss": 1.0},
        )
        model = get_peft_model(base, config).train()
        torch.manual_seed(1)
        model(inputs_embeds=torch.randn(2, 5, 8, requires_grad=True)).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=lambda m, n=name: n + m)


def test_total_and_means_of_a_forward_are_those_of_its_layers():
    forward = ForwardLosses(LossScale())
    expected, by_name = 0.0, {"z_loss": [], "importance": []}
    for place, experts in (("up", 4), ("down", 6), ("gate", 4)):
        routing = random_routing(7, experts, 2)
        losses = {"importance": LOSSES["importance"](), "z_loss": LOSSES["z_loss"]()}
        own = {name: loss.sums(routing).detach() for name, loss in losses.items()}
        coefficients = {"importance": 0.1 * experts, "z_loss": 0.2}
        layer = LayerLosses(losses, coefficients, "micro_batch", own)
        finish({(place, "default", 0): layer}, None)
        forward.layers[place, "default"] = [layer]
        for name, loss in losses.items():
            value = float(loss(routing).detach())
            expected += coefficients[name] * value
            by_name[name].append(value)
    assert float(forward.total()) == pytest.approx(expected)
    means = {name: float(value) for name, value in forward.mean_values().items()}
    assert means == pytest.approx({name: sum(values) / 3 for name, values in by_name.items()})
