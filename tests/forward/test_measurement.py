"""Places measured together have the sums and gradients of each alone."""

from __future__ import annotations

import pytest
import torch

from moe_peft.forward.joined_losses import LayerLosses, finish
from moe_peft.forward.measurement import Measurement, measure, own_graph, spread, tensors_of
from moe_peft.forward.objective import MeanLoss
from moe_peft.losses import LOSSES, LoadBalancing, LocalizedBalancing
from moe_peft.part import ABILITIES
from moe_peft.types import TokenContext
from tests.compare import full_routing, random_routing

LENGTHS = [5, 4, 1, 3]
CONTEXT = TokenContext(
    training=True,
    valid=torch.tensor([True] * 4 + [False] + [True] * 7 + [False]),
    sequences=torch.arange(4).repeat_interleave(torch.tensor(LENGTHS)),
    num_sequences=4,
    groups=torch.tensor([0, 1, 1, 0]),
)


class OwnSums(LoadBalancing):
    """Sums that take one place, though those of its base take several."""

    def sums(self, routing):
        assert routing.probs.dim() == 2
        return 2 * super().sums(routing)


def losses_of(name):
    made = {
        "localized_balancing": lambda: LocalizedBalancing(expert_groups=[0, 1, 1, 0], delta=0.3),
        "function": lambda: MeanLoss(lambda routing: routing.probs.square().sum() + routing.weights.sum()),
        "own_sums": OwnSums,
    }
    return {name: made[name]() if name in made else LOSSES[name]()}


def calls_of(names, top_k, sizes=(4, 4, 4), context=CONTEXT):
    """One call for each number of experts; each loss with another coefficient."""
    torch.manual_seed(0)
    read = frozenset().union(*(LOSSES[name].needs - ABILITIES for name in names if name in LOSSES))
    decided, made = full_routing if read else random_routing, []
    for number, experts in enumerate(sizes):
        losses = {key: loss for name in names for key, loss in losses_of(name).items()}
        coefficients = dict.fromkeys(losses, 0.1 + number)
        routing = decided(sum(LENGTHS), experts, top_k, context=context)
        made.append(Measurement(LayerLosses(losses, coefficients, "micro_batch"), routing))
    return made


def assert_as_each_alone(calls):
    """The reference is autograd of each loss on one decision."""
    expected = []
    for call in calls:
        leaves = {name: own.detach().requires_grad_() for name, own in tensors_of(call.routing).items()}
        extras = {name: leaves[f"extras.{name}"] for name in call.routing.extras}
        own = {name: leaf for name, leaf in leaves.items() if not name.startswith("extras.")}
        routing = type(call.routing)(**{**vars(call.routing), **own, "extras": extras})
        losses = call.losses
        total = sum(losses.coefficients[name] * loss(routing) for name, loss in losses.losses.items())
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        sums = {name: loss.sums(routing).detach() for name, loss in losses.losses.items()}
        expected.append((sums, dict(zip(leaves, gradients, strict=True))))
    with own_graph():
        stacks = measure(calls)
        finish({("place", "default", number): call.losses for number, call in enumerate(calls)}, None)
        spread(stacks)
    for call, (sums, gradients) in zip(calls, expected, strict=True):
        torch.testing.assert_close(call.losses.own, sums)
        assert call.routing is None
        for name, gradient in gradients.items():
            found = call.gradients.get(name)
            if gradient is None or not gradient.any():
                assert found is None or not found.any()
            else:
                torch.testing.assert_close(found, gradient)
    return stacks


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("name", [*sorted(LOSSES), "function", "own_sums"])
def test_sums_and_gradients_of_several_places_are_those_of_each(name, top_k):
    stacks = assert_as_each_alone(calls_of([name], top_k))
    assert [len(stack.members) for stack in stacks] == [3]


def test_losses_of_places_that_differ_in_size_context_or_settings_are_measured_in_groups():
    other = TokenContext(training=True, sequences=CONTEXT.sequences, num_sequences=4)
    calls = [
        *calls_of(["importance", "z_loss"], 2, sizes=(4, 6, 4)),
        *calls_of(["importance", "z_loss"], 2, (4,), other),
    ]
    stacks = assert_as_each_alone(calls)
    assert [len(stack.members) for stack in stacks] == [2, 1, 1]
    shifted = calls_of(["localized_balancing"], None)
    shifted[1].losses.losses["localized_balancing"].delta = 0.9
    assert [len(stack.members) for stack in assert_as_each_alone(shifted)] == [2, 1]


def test_tensors_that_no_loss_reads_are_not_stacked():
    (stack,) = measure(calls_of(["z_loss"], 2))
    assert set(stack.places.made) == {"logits"}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_known_whatever_mode_the_caller_is_in(mode):
    with mode():
        calls = calls_of(["importance"], None)
        with own_graph():
            stacks = measure(calls)
            finish({("place", "default", number): call.losses for number, call in enumerate(calls)}, None)
            spread(stacks)
    assert all(call.gradients["weights"].any() for call in calls)


def test_a_place_of_a_stack_is_the_decision_it_was():
    calls = calls_of(["function"], 2)
    (stack,) = measure(calls)
    for number, call in enumerate(calls):
        found = stack.places.place(number)
        assert torch.equal(found.experts, call.routing.experts) and torch.equal(
            found.gate_matrix(), call.routing.gate_matrix()
        )
        assert found.context is CONTEXT and torch.equal(found.request_matrix(), stack.places.request_matrix()[number])
