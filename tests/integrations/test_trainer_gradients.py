"""In every trainer the router losses' part of the gradient is that of an explicit mean over micro-batches.

The explicit losses are computed here, from the routing of an ordinary forward of each micro-batch that the trainer
made, and differentiated by autograd.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from transformers import TrainerCallback, set_seed

from moe_peft import attach, telemetry
from moe_peft.forward.tracker import find_tracker
from tests.integrations.trainers import TRAINERS

COEF, Z_COEF = 0.5, 0.05
OFFLINE = [name for name in TRAINERS if name not in ("grpo", "rloo")]
CHECKPOINTING = {
    "off": {},
    "non-reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}


class Watch(TrainerCallback):
    """Gradients before every optimizer step, and the inputs of the micro-batches that made them."""

    def __init__(self, model):
        self.windows, self.gradients, self._open = [], [], []
        model.get_base_model().model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, backbone, args, kwargs):
        if backbone.training and torch.is_grad_enabled():
            inputs = {**dict(zip(("input_ids", "attention_mask"), args, strict=False)), **kwargs}
            self._open.append({n: v.detach().clone() if torch.is_tensor(v) else v for n, v in inputs.items()})

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.windows.append(self._open)
        self._open = []
        self.gradients.append({n: p.grad.detach().clone() for n, p in _adapter(model).items() if p.grad is not None})


def _adapter(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad and ".routed_" in n and ".ref." not in n}


def watched(name, folder, coefs, accumulation, *, attached=True, breaking=None, **fields):
    """Train one epoch with learning rate zero."""
    set_seed(0)
    trainer = TRAINERS[name](folder, coefs, accumulation, **fields)
    if attached:
        attach(trainer)
    if breaking is not None:
        trainer.add_callback(breaking)
    watch = Watch(trainer.model)
    trainer.add_callback(watch)
    trainer.train()
    return trainer, watch


def explicit_losses(routings, inputs):
    """COEF * load balancing + Z_COEF * z-loss of one micro-batch, summed over layers."""
    mask = inputs.get("attention_mask")
    total = torch.zeros(())
    for made in routings.values():
        (routing,) = made
        keep = torch.ones(len(routing.logits)) if mask is None else mask.reshape(-1).float()
        requests = torch.nn.functional.one_hot(routing.experts, 4).sum(1) * keep[:, None]
        share = requests.sum(0) / requests.sum()
        mean_probs = (routing.logits.softmax(-1) * keep[:, None]).sum(0) / keep.sum()
        z = (routing.logits.logsumexp(-1).square() * keep).sum() / keep.sum()
        total = total + COEF * 4 * (share * mean_probs).sum() + Z_COEF * z
    return total


def explicit_gradients(model, window, bf16):
    """Gradient of the mean over a window's micro-batches."""
    model.train()
    model.gradient_checkpointing_disable()
    named = _adapter(model)
    autocast = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
    total = torch.zeros(())
    for inputs in window:
        with telemetry.record(model) as routings, autocast:
            model.get_base_model().model(**inputs)
        total = total + explicit_losses(routings, inputs) / len(window)
    grads = torch.autograd.grad(total, list(named.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(named, grads, strict=True))


def check(name, folder, accumulation, *, bf16=False, breaking=None, **fields):
    """Compare the gradient with the losses, less the one without, with the explicit gradient, window by window."""
    fields["bf16"] = bf16
    trainer, with_losses = watched(name, folder, (COEF, Z_COEF), accumulation, breaking=breaking, **fields)
    base, without = watched(name, folder, (0.0, 0.0), accumulation, **fields)
    assert [len(window) for window in with_losses.windows] == [len(window) for window in without.windows]
    for number, window in enumerate(without.windows):
        expected = explicit_gradients(base.model, window, bf16)
        for own, again in zip(with_losses.windows[number], window, strict=True):
            assert torch.equal(own["input_ids"], again["input_ids"])
        for key, wanted in expected.items():
            found = with_losses.gradients[number][key] - without.gradients[number][key]
            # Rounding of the task's gradient, which is subtracted: in bfloat16 a few of its last bits out of eight.
            noise = float(without.gradients[number][key].abs().max()) + float(wanted.abs().max())
            torch.testing.assert_close(
                found, wanted, rtol=0, atol=(4e-2 if bf16 else 3e-6) * noise, msg=lambda m, k=key: f"{k}: {m}"
            )
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entries and all(entry["moe/load_balancing"] > 0 and entry["moe/z_loss"] > 0 for entry in entries)
    routers = [g for key, g in expected.items() if "_router." in key]
    assert routers and any(float(g.abs().max()) > 1e-4 for g in routers)
    return with_losses


@pytest.mark.parametrize("name", ["plain", "dpo", "reward"])
def test_accumulation_with_a_short_last_window_under_reentrant_checkpointing(name, tmp_path):
    watch = check(name, tmp_path, 3, **CHECKPOINTING["reentrant"])
    assert [len(window) for window in watch.windows] == [3, 1]


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_online_trainers_with_generation_and_a_reference_pass(name, tmp_path):
    watch = check(name, tmp_path, 2, max_steps=1, **CHECKPOINTING["reentrant"])
    assert [len(window) for window in watch.windows] == [2]


@pytest.mark.parametrize("checkpointing", ["off", "non-reentrant"])
def test_other_checkpointing_without_accumulation(checkpointing, tmp_path):
    check("sft", tmp_path, 1, **CHECKPOINTING[checkpointing])


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_bfloat16_autocast(name, tmp_path):
    check(name, tmp_path, 3, bf16=True)


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("name", OFFLINE)
def test_all_settings_of_offline_trainers(name, accumulation, checkpointing, bf16, tmp_path):
    check(name, tmp_path, accumulation, bf16=bf16, **CHECKPOINTING[checkpointing])


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_all_settings_of_online_trainers(name, accumulation, checkpointing, bf16, tmp_path):
    check(name, tmp_path, accumulation, bf16=bf16, max_steps=2, **CHECKPOINTING[checkpointing])


def test_coefficient_zero_is_bit_for_bit_a_run_without_our_callback(tmp_path):
    runs = [watched("sft", tmp_path, (0.0, 0.0), 3, attached=attached)[1] for attached in (True, False)]
    for with_callback, without in zip(runs[0].gradients, runs[1].gradients, strict=True):
        assert all(torch.equal(with_callback[name], grad) for name, grad in without.items())


class Doubled(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        find_tracker(model).loss_scale *= 2


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_a_broken_scale_breaks_the_equality(name, bf16, tmp_path):
    with pytest.raises(AssertionError, match="routed_"):
        check(name, tmp_path, 3, bf16=bf16, breaking=Doubled())
