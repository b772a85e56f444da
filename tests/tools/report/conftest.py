"""One report on a tiny model, for the tests of its files."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

import moe_peft
from moe_peft.telemetry.history import RoutingHistory
from moe_peft.telemetry.meter import Reading
from moe_peft.telemetry.statistics import RoutingStatistics
from moe_peft.tools import routing_report
from tests.tiny import padded_batch, tiny_llama
from tests.train.tiny_run import make_tokenizer


def routed_model(**fields):
    """A model whose routers tell tokens apart, and whose experts have learned."""
    config = moe_peft.RoutedConfig(task_type="CAUSAL_LM", num_experts=4, top_k=2, init_weights=False, **fields)
    model = get_peft_model(tiny_llama(), config)
    with torch.no_grad():
        for layer in moe_peft.routed_layers(model):
            layer.router["default"].weight.mul_(40)
    return model.eval()


def batches_of(*groups: str):
    """Two batches with padding for each group."""
    return {
        group: [padded_batch([6, 4], seed=2 * n), padded_batch([5, 7], seed=2 * n + 1)]
        for n, group in enumerate(groups)
    }


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A report of two groups, one of which has a name that HTML must not take for its own, and of a history."""
    folder = tmp_path_factory.mktemp("history")
    history, generator = RoutingHistory(), torch.Generator().manual_seed(0)
    for step in (10, 20, 30):
        mass = torch.rand(4, generator=generator)
        statistics = RoutingStatistics(mass, mass, torch.tensor(5.0), torch.tensor(3.0))
        history.append(step, Reading({("model.layers.0.mlp.up_proj", "default"): statistics}, {}))
    history.save(folder)
    groups = batches_of("law", "<b>poems</b>")
    return routing_report(routed_model(), groups, tokenizer=make_tokenizer(), history=folder, title="a & b")
