"""Five steps of TRL's SFT trainer: every loss is in the logs, every tensor that trains moves, and no other does."""

from __future__ import annotations

import math

import pytest
import torch
from trl import SFTConfig, SFTTrainer

from moe_peft import attach, routed_layers
from moe_peft.extend import EXPERTS, SELECTORS, Router
from tests.integrations.trainers import NUM_ROWS, shared, token_rows, tokenizer
from tests.tiny import tiny_llama

from . import registered
from .cases import LEARNING, PLACED, config_of, context_needs, name_of
from .combinations import losses_for, placed

STEPS = 5
SETTINGS = {"learning_rate": 1e-2, "max_steps": STEPS, "max_grad_norm": 1.0}


def handful() -> list:
    """Choices in which every loss and every selector that changes its tensors takes part."""
    chosen, seen = [], set()
    for choice in sorted(LEARNING, key=lambda choice: -len(losses_for(choice))):
        router = choice[0]
        own = {*losses_for(choice), *([router] if router in SELECTORS and SELECTORS[router].counts else [])}
        if not own <= seen:
            chosen.append(choice)
            seen |= own
    return chosen


with registered():
    FIRST = handful()
CASES = [
    pytest.param(choice, id=name_of(choice), marks=[] if choice in FIRST else [pytest.mark.slow])
    for choice in LEARNING
] + [pytest.param(choice, id=name_of(choice)) for choice in placed()]


def trainer_of(choice, folder, seed: int):
    rows = token_rows()
    if "groups" in context_needs(choice):
        rows = rows.add_column("task_type", [row % 2 for row in range(NUM_ROWS)])
    if "prompt" in context_needs(choice):
        rows = rows.add_column("completion_mask", [[0] * 2 + [1] * (len(ids) - 2) for ids in rows["input_ids"]])
    kind = EXPERTS[choice[3]].placement
    where = {"target_modules": ["up_proj"]} if kind is None else PLACED[kind][1]
    return SFTTrainer(
        model=tiny_llama(seed=seed),
        args=SFTConfig(**{**shared(folder, 1, **SETTINGS), "seed": seed}),
        train_dataset=rows,
        processing_class=tokenizer(),
        peft_config=config_of(choice, task_type="CAUSAL_LM", **where),
    )


def tensors_of(model) -> dict[str, tuple[torch.Tensor, bool]]:
    """Copies of the parts' tensors, and whether each trains."""
    found = {}
    for layer in routed_layers(model):
        for kind, part in (("experts", layer.experts["default"]), ("router", layer.router["default"])):
            for name, tensor in part.named_parameters():
                select = getattr(part, "select", None)
                of_selector = select is not None and select.counts and name in select.tensors(part.num_experts)
                of_router = kind == "router" and type(part).counts is not Router.counts
                changes = name not in part.frozen or of_selector or (of_router and name in type(part).frozen)
                found[f"{layer.place}.{kind}.{name}"] = (tensor.detach().clone(), changes)
    return found


@pytest.mark.parametrize("choice", CASES)
def test_five_steps_of_sft_move_what_trains_and_log_every_loss(choice, tmp_path):
    stayed = stayed_in_five_steps(choice, tmp_path, seed=0)
    for seed in (1, 2):  # no token may have come to an expert; a tensor without a gradient stays with every seed
        stayed &= stayed_in_five_steps(choice, tmp_path, seed) if stayed else stayed
    assert not stayed, f"{sorted(stayed)} stayed as they were, and `frozen` does not name them"


def stayed_in_five_steps(choice, folder, seed: int) -> set[str]:
    """Tensors that train, and that five steps left as they were at every place."""
    trainer = attach(trainer_of(choice, folder, seed), layer_groups=0)
    before = tensors_of(trainer.model)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == STEPS and all(math.isfinite(entry["loss"]) for entry in steps)
    for name in losses_for(choice):
        values = [entry.get(f"moe/{name}") for entry in steps]
        assert all(value is not None and math.isfinite(value) for value in values), f"{name} in the logs: {values}"
    moved = set()
    for name, (tensor, changes) in tensors_of(trainer.model).items():
        assert torch.isfinite(tensor).all(), name
        if not torch.equal(tensor, before[name][0]):
            assert changes, f"{name} moved: `frozen` names what never trains"
            moved.add(of_part(name))
    return {of_part(name) for name, (_, changes) in before.items() if changes} - moved


def of_part(name: str) -> str:
    """A tensor's name without the place."""
    part = "experts" if ".experts." in name else "router"
    return f"{part}.{name.rpartition(f'.{part}.')[2]}"
