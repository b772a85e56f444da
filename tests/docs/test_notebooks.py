"""The notebooks run from top to bottom, and are saved without outputs."""

from __future__ import annotations

import json

import pytest

from tests.docs.pages import ROOT

NOTEBOOKS = sorted((ROOT / "examples/notebooks").glob("*.ipynb"))
EXPECTED = {"01_first_mixture": "equal: True", "02_sparse_model": "OlmoeForCausalLM equal: True"}


def test_every_notebook_says_what_it_prints():
    assert {path.stem for path in NOTEBOOKS} == EXPECTED.keys()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_run_in_order_and_are_saved_without_outputs(path, capsys):
    notebook = json.loads(path.read_text())
    assert notebook["nbformat"] == 4 and notebook["nbformat_minor"] >= 5
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    names: dict = {}
    for number, cell in enumerate(notebook["cells"], 1):
        assert "".join(cell["source"]).isascii()
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)
    assert EXPECTED[path.stem] in capsys.readouterr().out
