"""Routing by task: a sample's tokens get its task's row, through an embedding or a mask; unknown tasks are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import get_peft_model

from moe_peft import RoutedConfig, groups
from moe_peft.routers import Dense
from moe_peft.routers.task_table import TaskTable
from moe_peft.types import TokenContext
from tests.compare import assert_same
from tests.contract.cases import randomize
from tests.tiny import padded_batch, tiny_llama

from .made import D, E

CONTEXT = TokenContext(sequences=torch.tensor([0, 0, 1]), num_sequences=2, groups=torch.tensor([2, 0]))
MASK = [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


def table(**settings):
    torch.manual_seed(0)
    return TaskTable(D, E, select=Dense(), **{"num_tasks": 3, "init_std": 1.0, **settings}).double()


@pytest.mark.parametrize("width", [None, 2])
@pytest.mark.parametrize("mask", [None, MASK])
def test_equals_the_formula(width, mask):
    made, x = table(width=width, task_mask=mask), torch.randn(3, D).double()
    rows = []
    for task in (2, 2, 0):
        if width is None:
            z = made.weight[task]
        else:
            z = torch.stack([(made.weight[e] * made.embedding[task]).sum() for e in range(E)])
        allowed = [e for e in range(E) if mask is None or mask[task][e]]
        own = z[allowed].softmax(-1)
        rows.append(torch.zeros(E).double().index_put((torch.tensor(allowed),), own))
    leaves = list(made.parameters())
    assert len(leaves) == (1 if width is None else 2)
    assert_same(made(x, CONTEXT).weights, torch.stack(rows), leaves, leaves)


def test_an_untrained_table_uses_all_experts_of_a_task_alike():
    made = table(task_mask=MASK, init_std=None)
    expected = torch.tensor(MASK)[[2, 2, 0]].double() / 2
    torch.testing.assert_close(made(torch.randn(3, D).double(), CONTEXT).weights, expected, rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (torch.tensor([5]), r"num_tasks=3, but a sample is of task 5. .*set router_args={'num_tasks': 6}"),
        (torch.tensor([-1]), "but a sample is of task -1"),
        (None, "needs the task of every sample"),
    ],
)
def test_tasks_without_a_row_are_refused(tasks, message):
    with pytest.raises(ValueError, match=message):
        table()(torch.randn(3, D).double(), TokenContext(groups=tasks))


def test_a_model_knows_its_tasks_before_it_runs_in_training_evaluation_and_generation():
    config = RoutedConfig(
        task_type="CAUSAL_LM", scorer="task_table", router="dense", num_experts=3, r=2, router_args={"num_tasks": 3}
    )
    model, batch = get_peft_model(tiny_llama(), config).eval(), padded_batch([5, 3])
    randomize(model)
    with torch.no_grad():
        one, other = (model(**batch, task_type=torch.tensor(own)).logits for own in ([0, 1], [0, 2]))
    assert torch.equal(one[0], other[0]) and not torch.equal(one[1], other[1])
    with pytest.raises(ValueError, match=r"holds the sample groups \[7\].*no router knows \(known are \[0, 1, 2\]\)"):
        model(**batch, task_type=torch.tensor([0, 7]))
    with pytest.raises(ValueError, match=r"\[7\]"), groups(model, task_type=[0, 7]):
        pass
    with groups(model, task_type=[0, 1]):
        made = model.generate(**batch, max_new_tokens=2, do_sample=False)
    assert made.shape[1] == batch["input_ids"].shape[1] + 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"num_tasks": 0}, "num_tasks=0 must be a whole number"),
        ({"num_tasks": 1, "task_mask": [[0, 0]]}, "task_mask=.* must be None, or a list with a row for each task"),
        ({"task_mask": [[1, 0]]}, r"task_mask=\[\[1, 0\]\] must have a row for each of num_tasks=2, of 2 entries"),
        ({"task_mask": 3}, "task_mask=3 must be None"),
    ],
)
def test_options_that_cannot_be_are_refused(args, message):
    with pytest.raises(ValueError, match=message):
        RoutedConfig(scorer="task_table", router="dense", num_experts=2, router_args=args)


def test_a_column_that_the_model_takes_itself_is_refused():
    with pytest.raises(ValueError, match="group_column='labels' is an input of LlamaForCausalLM"):
        get_peft_model(tiny_llama(), RoutedConfig(scorer="task_table", router="dense", group_column="labels"))


def test_compiled_code_refuses_the_tasks_that_other_code_refuses():
    torch._dynamo.reset()
    made, x = table(), torch.randn(3, D).double()
    run = torch.compile(lambda context: made(x, context).weights, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(CONTEXT), made(x, CONTEXT).weights)
    for bad in (5, -1):
        unknown = replace(CONTEXT, groups=torch.tensor([bad, 0]))
        with pytest.raises(ValueError, match=f"num_tasks=3, but a sample is of task {bad}"):
            run(unknown)
