"""The programs of the page on extending run as printed, and what they make lives as the package's own types do."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from unittest.mock import patch

import torch
from peft import PeftModel, get_peft_model

from moe_peft.extend import EXPERTS, LOSSES, SCORERS
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
    registries = patch.dict(SCORERS), patch.dict(EXPERTS), patch.dict(LOSSES)
    with patch.dict(sys.modules, {"extending": module}), registries[0], registries[1], registries[2]:
        router, described, experts, loss, method = PROGRAMS
        exec(router, names)
        exec(described, names)
        assert "router top_k, top 2" in capsys.readouterr().out and names["config"].router_args == {"tau": 0.2}
        lives(names["config"], tmp_path / "router")
        exec(experts, names)
        exec(loss, names)
        assert names["config"].losses == {"token_entropy": 0.01}
        lives(names["config"], tmp_path / "all")
        exec(method, names)
        lives(names["HydraConfig"](task_type="CAUSAL_LM"), tmp_path / "method")


def test_the_router_of_the_page_has_twenty_lines():
    body = PROGRAMS[0].partition("class Cosine")[2].partition("SCORERS[")[0]
    assert len([line for line in body.splitlines() if line.strip()]) <= 20
