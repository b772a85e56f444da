"""Router losses in the gradient: what a plain loop trains is explicit autograd of loss + coef * aux."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from moe_peft import LoraMoeConfig, MoePeftWarning, MoloraConfig, RoutedConfig, SiraConfig, router_loss
from moe_peft.forward.objective import router_loss_values
from moe_peft.forward.tracker import find_tracker
from moe_peft.telemetry.functions import record
from tests import reference
from tests.compare import as_lists, chosen_of, gates_of
from tests.tiny import padded_batch, tiny_gpt2, tiny_llama

CHECKPOINTING = ["off", "non-reentrant", "reentrant"]
GROUPS = [1, 1, 0]
COEF = 0.3
Z_COEF = 0.07


def config_of(method, coef=COEF, z_coef=Z_COEF):
    shared = {
        "r": 2,
        "lora_dropout": 0.0,
        "init_weights": False,
        "router_aux_loss_coef": coef,
        "router_z_loss_coef": z_coef,
    }
    return {
        "loramoe": lambda: LoraMoeConfig(num_experts=3, expert_groups=GROUPS, localized_balancing_delta=0.4, **shared),
        "sira": lambda: SiraConfig(num_experts=4, top_k=2, capacity_factor=0.75, expert_dropout=0.2, **shared),
        "molora": lambda: MoloraConfig(num_experts=3, target_modules=["v_proj", "down_proj"], **shared),
        "routed": lambda: RoutedConfig(num_experts=4, top_k=2, target_modules=["up_proj", "q_proj"], **shared),
    }[method]()


def adapted(method, checkpointing="off", **kwargs):
    """Adapted tiny Llama in train mode; the same weights whatever the coefficients."""
    model = get_peft_model(tiny_llama(seed=3), config_of(method, **kwargs)).double().train()
    if checkpointing != "off":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        assert model.base_model.model.model.gradient_checkpointing
    return model


def batch_of(method, seed=1, lengths=(6, 3, 5), side="right", groups=(0, 1, 0)):
    batch = padded_batch(list(lengths), seed=seed, side=side)
    if method == "loramoe":
        batch["task_type"] = torch.tensor(groups)
    return batch


def task_loss(model, batch):
    """Cross-entropy of valid tokens; the seed fixes the expert dropout."""
    torch.manual_seed(11)
    logits = model(**batch, use_cache=False).logits[:, :-1]
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=-100)


def layer_losses(method, routing, batch):
    """(balance loss, z-loss) of one layer by the references, with masks and groups read off the batch."""
    rows, width = batch["input_ids"].shape
    sequences = [row for row in range(rows) for _ in range(width)]
    valid = batch["attention_mask"].reshape(-1).bool().tolist()
    gates, probs = gates_of(routing), as_lists(routing.probs)
    balance = {
        "loramoe": lambda: reference.localized_balancing(
            gates,
            3,
            sequences=sequences,
            valid=valid,
            expert_groups=GROUPS,
            groups=batch["task_type"].tolist(),
            delta=0.4,
        ),
        "sira": lambda: reference.gshard_load_balancing(probs, chosen_of(routing), valid),
        "molora": lambda: reference.importance(gates, 3, valid),
        "routed": lambda: reference.load_balancing(probs, chosen_of(routing), valid),
    }[method]()
    return balance, reference.z_loss(as_lists(routing.logits), valid)


def explicit(method, batch):
    """Task loss and router losses as tensors with a graph, on a model without any router loss of its own."""
    model = adapted(method, coef=0.0, z_coef=0.0)
    with record(model) as routings:
        loss = task_loss(model, batch)
    assert routings and all(len(made) == 1 for made in routings.values())
    pairs = [layer_losses(method, made[0], batch) for made in routings.values()]
    return model, loss, sum(COEF * balance + Z_COEF * z for balance, z in pairs)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


EXPLICIT: dict = {}


def explicit_parts(method, batch):
    """Gradient of the task loss, gradient of the router losses, value of the router losses; kept per batch."""
    key = (method, *(part.numpy().tobytes() for part in batch.values()))
    if key not in EXPLICIT:
        model, loss, aux = explicit(method, batch)
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        parts = []
        for value in (loss, aux):
            grads = torch.autograd.grad(
                value, list(named.values()), retain_graph=True, allow_unused=True, materialize_grads=True
            )
            parts.append(dict(zip(named, grads, strict=True)))
        EXPLICIT[key] = (*parts, float(aux.detach()))
    return EXPLICIT[key]


def explicit_gradients(method, batch, weight=1.0, divisor=1.0):
    task, aux, _ = explicit_parts(method, batch)
    return {name: (task[name] + weight * aux[name]) / divisor for name in task}


def assert_same_gradients(actual, expected, tolerance=1e-6):
    assert actual.keys() == expected.keys() and actual
    for name, wanted in expected.items():
        atol = tolerance * float(wanted.abs().max())
        torch.testing.assert_close(actual[name], wanted, rtol=tolerance, atol=atol, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("method", ["loramoe", "sira", "molora", "routed"])
def test_gradients_of_a_plain_loop_equal_explicit_autograd(method, checkpointing):
    batch = batch_of(method)
    model = adapted(method, checkpointing)
    task_loss(model, batch).backward()
    assert_same_gradients(gradients(model), explicit_gradients(method, batch))


@pytest.mark.parametrize("method", ["loramoe", "sira"])
def test_left_padding_is_left_out_too(method):
    batch = batch_of(method, side="left")
    model = adapted(method)
    task_loss(model, batch).backward()
    assert_same_gradients(gradients(model), explicit_gradients(method, batch))


@pytest.mark.parametrize("method", ["loramoe", "sira"])
def test_coefficient_zero_equals_no_router_loss(method):
    batch = batch_of(method)
    model = adapted(method, coef=0.0, z_coef=0.0)
    task_loss(model, batch).backward()
    without = explicit_gradients(method, batch, weight=0.0)
    assert_same_gradients(gradients(model), without)
    assert router_loss(model) == 0
    trained = adapted(method)
    task_loss(trained, batch).backward()
    with pytest.raises(AssertionError):
        assert_same_gradients(gradients(trained), without)


def test_a_broken_scale_breaks_the_equality(monkeypatch):
    batch = batch_of("loramoe")
    model = adapted("loramoe")
    monkeypatch.setattr(find_tracker(model), "loss_scale", 1.01)
    task_loss(model, batch).backward()
    with pytest.raises(AssertionError):
        assert_same_gradients(gradients(model), explicit_gradients("loramoe", batch))


def test_the_trackers_scale_is_the_weight_of_the_router_losses():
    batch = batch_of("loramoe")
    model = adapted("loramoe")
    find_tracker(model).loss_scale = 0.25
    task_loss(model, batch).backward()
    assert_same_gradients(gradients(model), explicit_gradients("loramoe", batch, weight=0.25))


@pytest.mark.parametrize("method", ["loramoe", "sira", "routed"])
def test_router_loss_is_the_weighted_sum_over_layers(method):
    batch = batch_of(method)
    model = adapted(method)
    task_loss(model, batch)
    assert float(router_loss(model).detach()) == pytest.approx(explicit_parts(method, batch)[2], rel=1e-6)


def test_router_loss_values_are_unscaled_means_over_layers():
    batch = batch_of("sira")
    model = adapted("sira")
    task_loss(model, batch)
    plain = adapted("sira", coef=0.0, z_coef=0.0)
    with record(plain) as routings:
        task_loss(plain, batch)
    pairs = [layer_losses("sira", made[0], batch) for made in routings.values()]
    values = router_loss_values(model)
    assert set(values) == {"gshard_load_balancing", "z_loss"}
    for name, column in zip(("gshard_load_balancing", "z_loss"), zip(*pairs, strict=True), strict=True):
        expected = torch.stack([value.detach() for value in column]).mean()
        torch.testing.assert_close(values[name].double(), expected, rtol=1e-6, atol=0)
        assert not values[name].requires_grad


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("method", ["loramoe", "sira"])
def test_adding_router_loss_in_any_scale_replaces_the_injected_weight(method, checkpointing):
    batch = batch_of(method)
    model = adapted(method, checkpointing)
    loss = task_loss(model, batch)
    ((loss + 0.5 * router_loss(model)) / 3).backward()
    assert_same_gradients(gradients(model), explicit_gradients(method, batch, weight=0.5, divisor=3.0))


def test_weight_zero_switches_the_router_losses_off():
    batch = batch_of("loramoe")
    model = adapted("loramoe")
    loss = task_loss(model, batch)
    (loss + 0.0 * router_loss(model)).backward()
    assert_same_gradients(gradients(model), explicit_gradients("loramoe", batch, weight=0.0))


def test_printing_router_loss_changes_no_gradient():
    batch = batch_of("loramoe")
    model = adapted("loramoe")
    loss = task_loss(model, batch)
    assert float(router_loss(model).detach()) > 0
    loss.backward()
    assert_same_gradients(gradients(model), explicit_gradients("loramoe", batch))


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_router_loss_alone_raises_in_the_backward_pass(checkpointing):
    model = adapted("loramoe", checkpointing)
    task_loss(model, batch_of("loramoe"))
    with pytest.raises(RuntimeError, match=r"The gradient of router_loss\(model\) is lost"):
        router_loss(model).backward()


def test_router_loss_added_after_the_backward_pass_raises():
    model = adapted("loramoe")
    task_loss(model, batch_of("loramoe")).backward()
    with pytest.raises(RuntimeError, match="is lost"):
        router_loss(model).backward()


@pytest.mark.parametrize("function", [router_loss, router_loss_values])
def test_before_any_training_forward_it_raises(function):
    with pytest.raises(RuntimeError, match="no training forward has run yet"):
        function(adapted("loramoe"))


@pytest.mark.parametrize("function", [router_loss, router_loss_values])
def test_a_model_without_routed_adapters_raises(function):
    with pytest.raises(ValueError, match="LlamaForCausalLM has no routed adapter"):
        function(tiny_llama())


@pytest.mark.parametrize("model", [None, "model", {}, torch.zeros(2)])
@pytest.mark.parametrize("function", [router_loss, router_loss_values])
def test_what_is_no_model_is_refused_by_type(function, model):
    with pytest.raises(TypeError, match=r"the model must be a torch\.nn\.Module"):
        function(model)


def run_eval(model, batch):
    model.eval()
    return model(**batch).logits.sum()


def run_no_grad(model, batch):
    with torch.no_grad():
        model(**batch)


def run_generate(model, batch):
    with torch.no_grad():
        model.generate(**{k: v for k, v in batch.items() if k != "task_type"}, max_new_tokens=3)
    assert model.training


@pytest.mark.parametrize("run", [run_eval, run_no_grad, run_generate])
@pytest.mark.parametrize("method", ["loramoe", "sira"])
def test_silent_outside_training_passes(method, run):
    model = adapted(method)
    with record(model) as routings:
        run(model, batch_of(method, side="left"))
    assert routings
    made = [routing for routings_of_place in routings.values() for routing in routings_of_place]
    assert not any(routing.context.training for routing in made)
    assert all(routing.dropped is None for routing in made)
    assert all(routing.probs.gt(0).all() for routing in made)
    with pytest.raises(RuntimeError, match="no training forward has run yet"):
        router_loss(model)


def test_gradient_in_evaluation_is_that_of_the_task_alone():
    batch = batch_of("loramoe")
    model, plain = adapted("loramoe").eval(), adapted("loramoe", coef=0.0, z_coef=0.0).eval()
    task_loss(model, batch).backward()
    task_loss(plain, batch).backward()
    assert_same_gradients(gradients(model), gradients(plain), tolerance=0.0)


def test_evaluation_between_forward_and_backward_changes_no_gradient():
    batch = batch_of("loramoe")
    model = adapted("loramoe")
    loss = task_loss(model, batch)
    model.eval()
    run_no_grad(model, batch_of("loramoe", seed=5))
    model.train()
    assert float(router_loss(model).detach()) == pytest.approx(explicit_parts("loramoe", batch)[2], rel=1e-6)
    loss.backward()
    assert_same_gradients(gradients(model), explicit_gradients("loramoe", batch))


def test_disabled_adapter_has_no_router_loss():
    model = adapted("loramoe")
    with model.disable_adapter(), record(model) as routings:
        task_loss(model, batch_of("loramoe"))
    assert not routings
    assert router_loss(model) == 0


def added(first, second):
    return {name: first[name] + second[name] for name in first}


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("method", ["loramoe", "sira"])
def test_two_forwards_before_one_backward_keep_their_own_masks(method, checkpointing):
    one, two = batch_of(method), batch_of(method, seed=2, lengths=(2, 6, 3), groups=(1, 1, 0))
    model = adapted(method, checkpointing)
    (task_loss(model, one) + task_loss(model, two)).backward()
    expected = added(explicit_gradients(method, one), explicit_gradients(method, two))
    assert_same_gradients(gradients(model), expected)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_forwards_before_two_backwards_in_any_order_keep_their_own_masks(checkpointing, order):
    method = "loramoe"
    batches = [batch_of(method), batch_of(method, seed=2, lengths=(2, 6, 3), groups=(1, 1, 0))]
    model = adapted(method, checkpointing)
    losses = [task_loss(model, batch) for batch in batches]
    for place in order:
        losses[place].backward()
    expected = added(explicit_gradients(method, batches[0]), explicit_gradients(method, batches[1]))
    assert_same_gradients(gradients(model), expected)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_a_forward_that_is_thrown_away_does_not_lend_its_mask(checkpointing):
    batch = batch_of("loramoe")
    model = adapted("loramoe", checkpointing)
    loss = task_loss(model, batch)
    task_loss(model, batch_of("loramoe", seed=2, lengths=(2, 6, 3), groups=(1, 1, 0)))
    loss.backward()
    assert_same_gradients(gradients(model), explicit_gradients("loramoe", batch))


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_many_forwards_before_one_backward_keep_their_own_masks(checkpointing):
    lengths = [(4, 1 + number % 3) for number in range(10)]
    batches = [batch_of("loramoe", seed=s, lengths=own, groups=(0, 1)) for s, own in enumerate(lengths)]
    model = adapted("loramoe", checkpointing)
    sum(task_loss(model, batch) for batch in batches).backward()
    expected = explicit_gradients("loramoe", batches[0])
    for batch in batches[1:]:
        expected = added(expected, explicit_gradients("loramoe", batch))
    assert_same_gradients(gradients(model), expected)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_accumulated_micro_batches_add_up(checkpointing):
    one, two = batch_of("sira"), batch_of("sira", seed=2, lengths=(2, 6, 3))
    model = adapted("sira", checkpointing)
    task_loss(model, one).backward()
    with pytest.warns(MoePeftWarning, match="gradients of several forwards add up before an optimizer step"):
        task_loss(model, two).backward()
    task_loss(model, two)
    expected = added(explicit_gradients("sira", one), explicit_gradients("sira", two))
    assert_same_gradients(gradients(model), expected)


def test_micro_batches_weighed_by_router_loss_do_not_warn():
    batches = [batch_of("sira"), batch_of("sira", seed=2, lengths=(2, 6, 3))]
    model = adapted("sira")
    for batch in batches:
        loss = task_loss(model, batch)
        ((loss + router_loss(model)) / 2).backward()
    expected = [explicit_gradients("sira", batch, divisor=2.0) for batch in batches]
    assert_same_gradients(gradients(model), added(*expected))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_optimizer_steps_between_forwards_do_not_warn(set_to_none):
    model = adapted("sira")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(3):
        task_loss(model, batch_of("sira")).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_nothing_is_counted_twice_under_checkpointing(checkpointing):
    model = adapted("loramoe", checkpointing)
    with record(model) as routings:
        loss = task_loss(model, batch_of("loramoe"))
        value = float(router_loss(model).detach())
        loss.backward()
    assert len(routings) == 6 and all(len(made) == 1 for made in routings.values())
    assert float(router_loss(model).detach()) == value
    losses = find_tracker(model).latest.layers
    assert len(losses) == 6 and all(len(made) == 1 for made in losses.values())


def trained_for_three_steps(checkpointing):
    model = adapted("loramoe", checkpointing)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(3):
        optimizer.zero_grad()
        task_loss(model, batch_of("loramoe", seed=step, lengths=(6, 1 + step, 5))).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("checkpointing", CHECKPOINTING[1:])
def test_training_steps_under_checkpointing_equal_those_without(checkpointing):
    expected = dict(trained_for_three_steps("off").named_parameters())
    start = dict(adapted("loramoe").named_parameters())
    for name, parameter in trained_for_three_steps(checkpointing).named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-6, atol=1e-8)
        assert torch.equal(parameter, start[name]) != parameter.requires_grad, name


def test_transforms_of_functions_are_refused_with_router_losses_and_work_without():
    def call(model, batch):
        parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

        def loss(own):
            return torch.func.functional_call(model, own, (), batch).logits.square().mean()

        return torch.func.grad(loss)(parameters)

    batch = batch_of("sira")
    with pytest.raises(ValueError, match=r"torch\.func's transforms \(grad, vmap, jvp\) do not run"):
        call(adapted("sira"), batch)
    model = adapted("sira").eval()
    found = call(model, batch)
    model(**batch).logits.square().mean().backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(found[name], gradient)


def gpt2_of(method, checkpointing, **coefficients):
    """A model that computes everything in float64, as llama's norms do not."""
    config = config_of(method, **coefficients)
    config.target_modules = {"c_fc", "c_proj"}
    model = get_peft_model(tiny_gpt2(), config).double().train()
    if checkpointing != "off":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


@pytest.mark.parametrize("checkpointing", CHECKPOINTING[:2])
@pytest.mark.parametrize("method", ["routed", "molora"])
def test_second_derivatives_are_refused_with_router_losses_and_right_without(method, checkpointing):
    batch = batch_of(method)

    def penalty(model, **kept):
        """The squared norm of the gradient, and what it is of."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        parts = torch.autograd.grad(task_loss(model, batch), parameters, **kept)
        return sum(gradient.square().sum() for gradient in parts), parameters

    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        model = gpt2_of(method, checkpointing)
        with pytest.raises(ValueError, match="of which create_graph=True makes two"):
            penalty(model, create_graph=True)
        task_loss(model, batch).backward()  # the model goes on
        model = gpt2_of(method, checkpointing, coef=0.0, z_coef=0.0)
        value, parameters = penalty(model, create_graph=True)
        torch.manual_seed(7)
        directions = [torch.randn_like(parameter) for parameter in parameters]
        second = torch.autograd.grad(value, parameters)
        found = sum((own * direction).sum() for own, direction in zip(second, directions, strict=True))
        values, step = [], 1e-5
        for change in (step, -2 * step):
            with torch.no_grad():
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter.add_(direction, alpha=change)
            values.append(float(penalty(model)[0]))
    assert found.item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


def test_derivatives_in_forward_mode_are_refused():
    model, batch = adapted("routed"), batch_of("routed")
    name, parameter = next((n, p) for n, p in model.named_parameters() if n.endswith("routed_router.default.weight"))
    with forward_ad.dual_level(), pytest.raises((ValueError, NotImplementedError), match="forward mode AD"):
        dual = forward_ad.make_dual(parameter.detach(), torch.ones_like(parameter))
        torch.func.functional_call(model, {name: dual}, (), {**batch, "use_cache": False})
    task_loss(model, batch).backward()
