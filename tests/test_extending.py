"""The programs of the page on extending run as printed, and what they make lives as the package's own types do."""

from __future__ import annotations

import re
import sys
import types
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

import moe_peft
from moe_peft import extend
from moe_peft.extend import EXPERTS, LOSSES, METHODS, SCORERS
from tests.tiny import padded_batch, tiny_llama

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def lives(config, folder) -> None:
    """Train a step, save, load, compare; and start as the base model."""
    batch, base = padded_batch([7, 4]), tiny_llama().eval()
    model = get_peft_model(tiny_llama(), config)
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, base(**batch).logits)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        model.train()(**batch, labels=batch["input_ids"]).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    loaded = PeftModel.from_pretrained(tiny_llama(), folder).eval()
    with torch.no_grad():
        assert not torch.equal(model(**batch).logits, base(**batch).logits)
        assert torch.equal(model(**batch).logits, loaded(**batch).logits)


def test_the_programs_run_as_printed_and_their_parts_train_save_and_load(tmp_path, capsys):
    module = types.ModuleType("extending")
    names = vars(module)
    names["model"] = tiny_llama()
    with ExitStack() as kept:
        kept.enter_context(patch.dict(sys.modules, {"extending": module}))
        for registry in (SCORERS, EXPERTS, LOSSES, METHODS):
            kept.enter_context(patch.dict(registry))
        router, described, experts, loss, method, named, _ = PROGRAMS
        exec(router, names)
        exec(described, names)
        assert "router top_k, top 2" in capsys.readouterr().out and names["config"].router_args == {"tau": 0.2}
        lives(names["config"], tmp_path / "router")
        exec(experts, names)
        exec(loss, names)
        assert names["config"].losses == {"my_entropy": 0.01}
        lives(names["config"], tmp_path / "all")
        exec(method, names)
        lives(names["HydraConfig"](task_type="CAUSAL_LM"), tmp_path / "method")
        exec(named, names)
        assert METHODS["hydra"] is names["HydraConfig"]


def test_a_callback_of_a_users_steers_choices_masks_and_coefficients_through_public_names(tmp_path):
    names: dict = {}
    exec(PROGRAMS[-1], names)
    imported = re.findall(r"^from (?:moe_peft\S*) import (.*)$", PROGRAMS[-1], re.MULTILINE)
    assert all(set(line.split(", ")) <= {*moe_peft.__all__, *extend.__all__} for line in imported)
    assert not re.search(r"\._[a-z]", PROGRAMS[-1])

    config = moe_peft.RoutedConfig(num_experts=3, top_k=1, target_modules=["q_proj"], router_aux_loss_coef=0.1)
    model = get_peft_model(tiny_llama(), config)
    costs, routings = [], []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            costs.append(float(moe_peft.router_loss(model)))

    moe_peft.routed_layers(model)[0].router["default"].register_forward_hook(
        lambda module, args, routing: routings.append(routing)
    )
    args = TrainingArguments(str(tmp_path), max_steps=4, per_device_train_batch_size=2, use_cpu=True, report_to=[])
    data = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]} for _ in range(8)]
    Trainer(model, args, train_dataset=data, callbacks=[names["Curriculum"](), Watch()]).train()
    assert [routing.experts.shape[1] for routing in routings] == [1, 1, 2, 2]
    assert not any((routing.experts == 0).any() for routing in routings[2:])
    assert min(costs[:2]) > 20 * max(costs[2:]) > 0


def test_the_router_of_the_page_has_twenty_lines():
    body = PROGRAMS[0].partition("class Cosine")[2].partition("SCORERS[")[0]
    assert len([line for line in body.splitlines() if line.strip()]) <= 20
