"""Experts compete in some training steps and a router learns who wins: formula, draws, passes, and the learning."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.nn import functional as F

from moe_peft import RoutedConfig, after_step, routed_layers, router_loss
from moe_peft.losses.router_distillation import RouterDistillation
from moe_peft.routers import LinearRouter, TopK
from moe_peft.routers.compete import Compete
from moe_peft.types import TokenContext
from tests.compare import assert_same
from tests.contract.cases import randomize
from tests.tiny import OneLinear, padded_batch, tiny_llama

from .made import TRAINING, D, E, T

OUT = 5
ALWAYS = {"compete_rate": 1.0, "warm_up": 0}


def layer_of(**fields):
    torch.manual_seed(0)
    args = {**ALWAYS, **fields.pop("router_args", {})}
    settings = {
        "num_experts": E,
        "r": 3,
        "lora_alpha": 5,
        "norm_topk_prob": True,
        "target_modules": ["linear"],
        **fields,
    }
    model = get_peft_model(OneLinear(D, OUT), RoutedConfig(scorer="compete", router_args=args, **settings)).double()
    randomize(model)
    (layer,) = routed_layers(model)
    layer.router["default"].steps.data.zero_()
    return layer, torch.randn(T, D).double().requires_grad_(), torch.randn(T, OUT).double()


@pytest.mark.parametrize("experts", ["low_rank", "bottleneck"])
@pytest.mark.parametrize("shared", [0, 1])
def test_a_competing_layer_equals_the_formula(experts, shared):
    layer, x, out = layer_of(
        experts=experts,
        experts_args={"shared": shared},
        router_aux_loss_coef=0.0,
        **({"lora_alpha": None} if experts == "bottleneck" else {}),
    )
    bank, router, decided = layer.experts["default"], layer.router["default"], []
    router.register_forward_hook(lambda _, __, routing: decided.append(routing))
    found, expected, student, teacher = layer.add("default", x, out, TRAINING), [], [], []
    act = F.silu if experts == "bottleneck" else lambda h: h
    for t in range(T):
        own = [bank.scaling * act(x[t] @ bank.A[e].T) @ bank.B[e] for e in range(E + shared)]
        a = torch.stack([(1 + added.exp()).log().mean() for added in own[:E]])
        best = sorted(range(E), key=lambda e: -a[e].item())[:2]
        expected.append(out[t] + sum(a[e] / a[best].sum() * own[e] for e in best) + sum(own[E:]))
        student.append((router.weight @ x[t]).softmax(-1))
        teacher.append(a.softmax(-1))
    leaves = [x, bank.A, bank.B]
    assert_same(found, torch.stack(expected), leaves, leaves, 1e-10)
    (routing,) = decided
    assert_same(routing.extras["student_probs"], torch.stack(student), [x, router.weight], [x, router.weight], 1e-10)
    torch.testing.assert_close(routing.extras["teacher_probs"], torch.stack(teacher))
    assert not routing.extras["teacher_probs"].requires_grad


def test_evaluation_and_passes_that_nothing_may_perturb_know_the_matrix_alone():
    layer, x, out = layer_of(router_aux_loss_coef=0.0)
    router = layer.router["default"]
    plain = LinearRouter(D, E, select=TopK(top_k=2, norm_topk_prob=True)).double()
    plain.load_state_dict({"weight": router.weight})
    competing = layer.add("default", x, out.clone(), TRAINING)
    found = [layer.add("default", x, out.clone(), TokenContext())]
    router.perturbs_training = False
    found.append(layer.add("default", x, out.clone(), TRAINING))
    layer.router["default"] = plain
    expected = layer.add("default", x, out.clone(), TokenContext())
    assert all(torch.equal(own, expected) for own in found) and not torch.equal(competing, expected)
    routing = router(x, TRAINING)  # called without what the experts would add
    assert torch.equal(routing.extras["student_probs"], routing.extras["teacher_probs"])


def draws(layer_index: int, steps: int, **settings) -> list[bool]:
    router = Compete(D, E, select=TopK(top_k=2), **settings)
    router.stands_in(layer_index, 4)
    found = []
    for _ in range(steps):
        found.append(router.competes)
        router.after_step(None)
    assert router.steps.item() == steps
    return found


def test_layers_draw_for_themselves_alike_in_every_process_and_never_before_the_warm_up():
    first, again, other = (draws(index, 400, compete_rate=0.25, warm_up=100) for index in (1, 1, 2))
    assert first == again and first != other
    assert not any(first[:100]) and 50 < sum(first[100:]) < 100
    assert not any(draws(0, 20, compete_rate=0.0, warm_up=0)) and all(draws(0, 20, **ALWAYS))


def test_a_loaded_adapter_goes_on_with_the_step_it_was_saved_at(tmp_path):
    config = RoutedConfig(scorer="compete", num_experts=E, router_args={"compete_rate": 1.0, "warm_up": 2})
    model, batch = get_peft_model(tiny_llama(), config).train(), padded_batch([5, 3])
    seen = []
    for _ in range(3):
        seen.append({layer.router["default"].competes for layer in routed_layers(model)})
        model.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        after_step(model)
    assert seen == [{False}, {False}, {True}]
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    routers = [layer.router["default"] for layer in routed_layers(again)]
    assert all(router.competes and router.steps.item() == 3 and not router.steps.requires_grad for router in routers)


def test_a_competing_step_is_the_same_under_either_kind_of_checkpointing():
    fields = {"losses": {"router_distillation": 1.0}, "target_modules": ["q_proj", "up_proj"], "lora_dropout": 0.3}
    model = get_peft_model(tiny_llama(), RoutedConfig(scorer="compete", num_experts=E, router_args=ALWAYS, **fields))
    model, batch, results = model.double().train(), padded_batch([5, 3]), []
    randomize(model)
    for reentrant in (None, False, True):
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        torch.manual_seed(1)
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        assert router_loss(model) > 0
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
        torch.testing.assert_close(results[-1], results[0], rtol=1e-9, atol=1e-12)
    assert all(grad.abs().sum() > 0 for grad in results[0][1:])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_router_learns_who_wins(seed):
    layer, _, _ = layer_of(losses={"router_distillation": 1.0}, router_aux_loss_coef=0.0)
    router, bank = layer.router["default"], layer.experts["default"]
    generator = torch.Generator().manual_seed(seed)
    centers = 2 * torch.randn(4, D, generator=generator).double()
    optimizer = torch.optim.Adam([router.weight], lr=0.05)

    def batch():
        which = torch.randint(4, (64,), generator=generator)
        return centers[which] + 0.2 * torch.randn(64, D, generator=generator)

    def missed() -> float:
        """Share of the tokens whose winner the router does not know."""
        x = batch()
        answers = F.softplus(torch.einsum("td,erd,ero->teo", x, bank.A, bank.B) * bank.scaling).mean(-1)
        return float((router(x, TokenContext()).probs.argmax(-1) != answers.argmax(-1)).double().mean())

    router.weight.data.neg_()
    before = missed()
    for _ in range(200):
        x = batch()
        responses = bank.responses(bank.activations(bank.prepare(x, TokenContext())))
        routing = router(x, TRAINING, responses)
        optimizer.zero_grad()
        RouterDistillation()(routing).backward()
        optimizer.step()
    assert missed() < min(0.25, before / 2)


@pytest.mark.parametrize("experts", ["shared_down", "normed", "goat"])
def test_experts_that_do_not_tell_what_each_would_add_are_refused(experts):
    with pytest.raises(ValueError, match=r"scorer='compete' must be one that needs no responses.*low_rank"):
        RoutedConfig(scorer="compete", experts=experts)
