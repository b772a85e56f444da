"""A run without a learning rate gets that of its method and its kind of training; a given one stays."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from baselines import PlainLora
from rates import FACTORS, choose_rate, default_rate, scale_of

import moe_peft
from moe_peft.cli.verbs import VERBS
from moe_peft.methods import METHODS
from moe_peft.methods.scale import pace_alpha

SELECTED = {"0": [0]}


def configs():
    for config in METHODS.values():
        yield config(experts=SELECTED) if config is moe_peft.EsftConfig else config()


def test_every_method_learns_at_a_rate_of_adapters_and_not_of_full_fine_tuning():
    for config in configs():
        whole = isinstance(config, moe_peft.EsftConfig)
        assert (1e-5 if whole else 1e-4) <= default_rate(config, "sft") <= 1e-2
    lora = moe_peft.EsftConfig(experts=SELECTED, expert_adapter="lora")
    assert default_rate(lora, "sft") == 2e-4


def test_every_kind_of_training_has_its_factor():
    assert set(FACTORS) == {script for _, script, _ in VERBS.values() if script} - {"select_experts"}


@pytest.mark.parametrize("given", [frozenset({"learning_rate"}), None])
def test_a_rate_that_was_given_stays(given):
    training = SimpleNamespace(learning_rate=0.5)
    moe = SimpleNamespace() if given is None else SimpleNamespace(given=given)
    assert choose_rate(training, moe, moe_peft.MovConfig(), "dpo") == "learning rate: 0.5"
    assert training.learning_rate == 0.5


def test_a_rate_that_was_left_out_is_the_methods():
    training = SimpleNamespace(learning_rate=1e-6)
    line = choose_rate(training, SimpleNamespace(given=frozenset()), moe_peft.LoraMoeConfig(), "dpo")
    line, scale = line.splitlines()
    assert (training.learning_rate, line) == (2e-5, "learning rate: 2e-05, the default of LoRAMoE for dpo")
    assert scale.startswith("lora_alpha: 32, 0.")


def test_a_scale_that_is_far_from_loras_pace_is_said_with_the_factor():
    alpha = pace_alpha(moe_peft.MoloraConfig())
    said = scale_of(moe_peft.MoloraConfig())
    assert said.startswith(f"\nlora_alpha: 16, {16 / alpha:.2g} of the {alpha:g} at which") and alpha > 32
    assert scale_of(moe_peft.MoloraConfig(lora_alpha=alpha)) == ""
    for silent in (moe_peft.RoutedConfig(), moe_peft.SiraConfig(), moe_peft.MovConfig(), PlainLora(lora_alpha=1)):
        assert scale_of(silent) == ""
