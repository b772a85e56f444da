"""float16 training: the router losses are scaled with the loss, whatever the scaler's scale is."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from transformers import TrainerControl, TrainerState, TrainingArguments

from moe_peft.integrations import MoeCallback
from tests.integrations.test_callback import adapted
from tests.tiny import padded_batch


def unscaled_gradients(scale, folder, *, with_callback=True, scaler_scales=()):
    """Gradients of one step of a loop with a real scaler, whose scale the trainer's callback reads."""
    args = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[])
    Accelerator(cpu=True)
    model = adapted().train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    optimizer = AcceleratedOptimizer(torch.optim.SGD(parameters, lr=0.0), device_placement=False, scaler=scaler)
    callback, state, control = MoeCallback(), TrainerState(), TrainerControl()
    gradients = []
    for new_scale in (None, *scaler_scales):
        if new_scale is not None:
            scaler.update(new_scale)
        if with_callback:
            callback.on_step_begin(args, state, control, model=model, optimizer=optimizer)
        batch = padded_batch([6, 4], seed=1)
        scaler.scale(model(**batch, labels=batch["input_ids"]).loss).backward()
        scaler.unscale_(optimizer.optimizer)
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
    return gradients


def assert_close(found, expected):
    for name, wanted in expected.items():
        atol = 1e-6 * max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def test_unscaled_gradients_do_not_depend_on_the_scale_nor_on_its_changes(tmp_path):
    (expected,) = unscaled_gradients(1.0, tmp_path)
    for found in unscaled_gradients(65536.0, tmp_path, scaler_scales=(1024.0, 4.0)):
        assert_close(found, expected)


def test_without_the_callback_the_router_losses_are_scaled_away(tmp_path):
    (expected,) = unscaled_gradients(1.0, tmp_path)
    (lost,) = unscaled_gradients(65536.0, tmp_path, with_callback=False)
    with pytest.raises(AssertionError):
        assert_close(lost, expected)
