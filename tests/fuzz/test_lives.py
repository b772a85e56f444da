"""Random lives of adapters: a slice of them in every run of the tests, thousands with `make fuzz`."""

from __future__ import annotations

import os
import random

import pytest
import torch

from . import snapshot
from .laws import BrokenLawError, adapter_tensors
from .life import Life
from .operations import OPERATIONS
from .program import Program, draw_program, run, shrink

SLICE, CHUNK = 20, 20
LIVES = int(os.environ.get("FUZZ_LIVES", "2000"))
FIRST = int(os.environ.get("FUZZ_FROM", str(SLICE)))


def live(seed: int) -> None:
    program = draw_program(seed)
    failure = run(program)
    if failure is not None:
        pytest.fail(f"seed {seed}\n{shrink(program, failure)[1].text}", pytrace=False)


@pytest.mark.parametrize("seed", range(SLICE))
def test_every_life_keeps_the_laws(seed):
    live(seed)


@pytest.mark.fuzz
@pytest.mark.parametrize("first", range(FIRST, FIRST + LIVES, CHUNK))
def test_many_lives_keep_the_laws(first):
    for seed in range(first, first + CHUNK):
        live(seed)


def forget_a_weight(life: Life, rng: random.Random) -> None:
    """A planted fault: an operation that moves one weight of one adapter."""
    for name in life.known:
        life.log.append("plant a fault")
        next(iter(adapter_tensors(life.model, name).values())).data.view(-1)[0] += 1
        return


def refuse_late(life: Life, rng: random.Random) -> None:
    """A planted fault: a refusal that leaves a hook."""

    def action() -> None:
        life.model.register_forward_hook(lambda *_: None)
        raise ValueError("too late")

    life.attempt("register a hook, then refuse", action)


@pytest.mark.parametrize(
    ("fault", "law"),
    [(forget_a_weight, "active adapters alone|weights of the adapter stay"), (refuse_late, "refused operation")],
)
def test_planted_fault_is_found_and_made_short(fault, law):
    operations = {**OPERATIONS, "fault": (1.0, fault)}
    noise = (("activate", 1), ("disable", 2), ("copied", 3))
    program = Program("llama", "peft", (("add", 5), *noise, ("fault", 6), *noise))
    failure = run(program, operations)
    assert failure is not None
    shorter, failure = shrink(program, failure, operations)
    assert [name for name, _ in shorter.steps] in (["add", "fault"], ["fault"])
    assert any(part in failure.law for part in law.split("|"))
    assert "llama" in failure.text and repr(shorter) in failure.text


def test_snapshot_sees_hooks_flags_values_and_adapters():
    def changed(change) -> str | None:
        life = Life("llama", "peft")
        OPERATIONS["add"][1](life, random.Random(0))
        before = snapshot.take(life.model)
        assert snapshot.difference(before, snapshot.take(life.model)) is None
        change(life.model)
        return snapshot.difference(before, snapshot.take(life.model))

    parameter = "base_model.model.lm_head.weight"
    assert "mode of" in changed(lambda model: model.train())
    assert "_forward_hooks" in changed(lambda model: model.base_model.register_forward_hook(print))
    assert parameter in changed(lambda model: model.get_parameter(parameter).requires_grad_())
    assert "other values" in changed(lambda model: model.get_parameter(parameter).data.zero_())
    assert "adapters of" in changed(lambda model: model.peft_config.update(other=model.active_peft_config))
    assert "module" in changed(lambda model: setattr(model.base_model.model, "lm_head", torch.nn.Identity()))


def test_same_seed_is_the_same_program():
    assert draw_program(7) == draw_program(7) != draw_program(8)
    assert issubclass(BrokenLawError, AssertionError)
