"""Two processes on halves of a batch compute what one computes on the whole: gradients, losses, saved adapters."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.processes import apart, worker
from tests.processes.together import run_together

pytestmark = pytest.mark.multi_process


def run_processes(folder, wrapping, world=2):
    """Run the worker in several processes of their own."""
    command = [sys.executable, "-m", "tests.processes.worker"]
    run_together([[*command, str(rank), str(world), str(folder), wrapping] for rank in range(world)])
    return folder, json.loads((folder / "facts.json").read_text())


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    return run_processes(tmp_path_factory.mktemp("ddp"), "ddp")


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    return run_processes(tmp_path_factory.mktemp("fsdp"), "fsdp")


def single(case):
    model = worker.model_of(case)
    worker.task_loss(model, worker.batch_of(case, 0, 1), 1).backward()
    loss = float(worker.router_loss(model).detach())
    return model, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}, loss


def assert_close(found, expected):
    assert found.keys() == expected.keys() and expected
    for name, wanted in expected.items():
        atol = 2e-6 * float(wanted.abs().max())
        torch.testing.assert_close(found[name], wanted, rtol=2e-5, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", [case for case in worker.CASES if case != "micro"])
def test_gradients_of_two_processes_are_those_of_one_on_the_whole_batch(case, ddp):
    folder, facts = ddp
    _, expected, loss = single(case)
    assert_close(load_file(folder / f"{case}.safetensors"), expected)
    assert [own["router_loss"] for own in facts[case]] == pytest.approx([loss] * 2, rel=1e-5)


@pytest.mark.parametrize("router", worker.ROUTERS)
def test_steps_are_joined_where_processes_have_called_other_layers(router, ddp):
    expected = worker.told_after_steps(router, [0, 1])
    assert [len(step) for step in expected] == [6, 6, 6]
    for rank in range(2):
        found = torch.load(ddp[0] / f"told{rank}.pt", weights_only=True)[router]
        for step, wanted in zip(found, expected, strict=True):
            assert step.keys() == wanted.keys()
            for place, sums in wanted.items():
                assert len(step[place]) == len(sums) == (5 if router == "capacity" else 4)
                torch.testing.assert_close(step[place], sums, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", apart.CASES)
def test_router_losses_are_those_of_all_rows_where_processes_call_other_layers(name, ddp):
    folder, _ = ddp
    expected = list(apart.of_one_process(apart.CASES[name]))
    for rank in range(2):
        found = torch.load(folder / f"apart{rank}.pt", weights_only=True)[name]
        for step, wanted in zip(found, expected, strict=True):
            assert_close(step, wanted)
    assert all(any(gradient.any() for gradient in step.values()) for step in expected[:1])


def test_the_first_process_sends_nothing_to_the_copies_of_the_last_layer():
    used = []
    for rank in range(2):
        base = worker.base_of("esft-idle")
        last = base.model.layers[1].mlp.experts
        last.register_forward_pre_hook(lambda _, args: used.append(set(args[1].flatten().tolist())))
        base(**worker.batch_of("esft-idle", rank, 2))
    copied = set(worker.IDLE["1"])
    assert not copied & used[0] and copied <= used[1]


def test_balance_over_the_micro_batch_is_another_gradient(ddp):
    folder, facts = ddp
    _, expected, _ = single("micro")
    with pytest.raises(AssertionError):
        assert_close(load_file(folder / "micro.safetensors"), expected)
    assert facts["micro"][0]["router_loss"] != facts["micro"][1]["router_loss"]


@pytest.mark.parametrize("case", worker.CASES)
def test_a_training_forward_costs_one_all_reduce_and_nothing_else_costs_any(case, ddp):
    _, facts = ddp
    for own in facts[case]:
        joined = 0 if worker.CASES[case][0] in worker.WITHOUT_LOSSES else 1
        assert own["forward"] == {"micro": 0}.get(case, joined)
        assert own["backward"] == own["evaluation"] == 0


@pytest.mark.parametrize("case", worker.FSDP_CASES)
def test_sharded_parameters_train_as_whole_ones(case, fsdp):
    folder, facts = fsdp
    model, expected, loss = single(case)
    found = load_file(folder / f"{case}.safetensors")
    own = {name: value for name, value in found.items() if not name.startswith(("saved.", "logits."))}
    assert_close(own, expected)
    assert [value["router_loss"] for value in facts[case]] == pytest.approx([loss] * 2, rel=1e-5)
    for name, value in worker.stepped(model.eval()).items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    assert not torch.equal(found["logits.on"], found["logits.off"])
