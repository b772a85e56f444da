"""`accelerator.save_state` and `load_state` in a loop of one's own: training goes on bit for bit."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model

import moe_peft
from moe_peft import LoraMoeConfig, MoloraConfig, MovConfig, PerftConfig, RoutedConfig, SiraConfig
from moe_peft.forward.tracker import find_tracker
from moe_peft.integrations import AdaptiveCoefficients
from tests.contract.cases import randomize
from tests.tiny import padded_batch, tiny_llama, tiny_mixtral

SMALL = {"num_experts": 4, "r": 2}
CASES = {
    "loramoe": (tiny_llama, LoraMoeConfig(**SMALL, lora_dropout=0.1)),
    "molora": (tiny_llama, MoloraConfig(**SMALL)),
    "sira": (tiny_llama, SiraConfig(**SMALL, top_k=2)),
    "mov": (tiny_llama, MovConfig(num_experts=4)),
    "perft": (tiny_mixtral, PerftConfig(**SMALL, top_k=2)),
    "balancing bias": (tiny_llama, RoutedConfig(**SMALL, router="bias_balanced", top_k=2, router_jitter_noise=0.1)),
    "adapting loss": (
        tiny_llama,
        RoutedConfig(**SMALL, router="positive", gate="relu", router_aux_loss_coef=0.0, losses={"active_l1": 1e-3}),
    ),
}


class Loop:
    """A plain loop of two micro-batches per step, prepared by accelerate."""

    def __init__(self, name, seed=0):
        make, config = CASES[name]
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = get_peft_model(make(), config).train()
        randomize(model)
        torch.manual_seed(seed)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.coefficients = AdaptiveCoefficients.of(self.model)
        self.accelerator.register_for_checkpointing(self.coefficients)
        self.losses = []

    def train(self, steps):
        for step in steps:
            for part in range(2):
                batch = padded_batch([6, 4], seed=2 * step + part)
                with self.accelerator.accumulate(self.model):
                    loss = self.model(**batch, labels=batch["input_ids"]).loss
                    total = loss + moe_peft.router_loss(self.model)
                    self.accelerator.backward(total)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                self.losses.append(total.detach())
            moe_peft.after_step(self.model)
        return self


SLOW = ("molora", "mov", "perft")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CASES])
def test_a_loop_goes_on_from_a_saved_state_bit_for_bit(name, tmp_path):
    whole = Loop(name).train([0, 1])
    whole.accelerator.save_state(str(tmp_path))
    whole.train([2, 3])
    resumed = Loop(name, seed=1)
    for parameter in resumed.optimizer.param_groups[0]["params"]:
        parameter.data.mul_(0.5)
    resumed.accelerator.load_state(str(tmp_path))
    resumed.train([2, 3])
    assert resumed.losses == whole.losses[4:]
    expected = whole.model.state_dict()
    for key, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[key]), key
    assert resumed.coefficients.get() == whole.coefficients.get()
    for tracker in (find_tracker(own.model) for own in (whole, resumed)):
        assert tracker.loss_scale == 1.0 and tracker.window is None and not tracker.counted


def test_what_parts_learn_of_their_own_is_in_the_state(tmp_path):
    whole = Loop("balancing bias").train([0, 1])
    biases = {key: value for key, value in whole.model.state_dict().items() if key.endswith(".bias")}
    assert biases and all(value.any() for value in biases.values())
    adapting = Loop("adapting loss")
    before = adapting.coefficients.get()
    assert before and adapting.train([0, 1]).coefficients.get() != before


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, r"those of \[\], and the model has those of \['default/active_l1'\]"),
        ({"other/active_l1": 0.1}, r"those of \['other/active_l1'\]"),
        (["default/active_l1"], "the model has those of"),
        (
            {"default/active_l1": float("nan")},
            "coefficient of 'default/active_l1' is nan, and must be a finite number",
        ),
        ({"default/active_l1": "0.1"}, "is '0.1', and must be"),
    ],
)
def test_coefficients_of_another_model_or_broken_ones_are_refused(state, message):
    make, config = CASES["adapting loss"]
    coefficients = AdaptiveCoefficients.of(get_peft_model(make(), config))
    before = coefficients.get()
    with pytest.raises(ValueError, match=message):
        coefficients.load_state_dict(state)
    assert coefficients.get() == before
    coefficients.load_state_dict({"default/active_l1": 0.25})
    assert coefficients.state_dict() == {"default/active_l1": 0.25}
