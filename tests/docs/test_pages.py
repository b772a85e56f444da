"""The programs of the pages run as they are printed, from top to bottom, on tiny models in the place of large ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer

from moe_peft.telemetry.history import RoutingHistory
from moe_peft.telemetry.meter import Reading
from moe_peft.telemetry.statistics import RoutingStatistics
from moe_peft.types import Routing
from tests.contract.cases import tiny_olmoe
from tests.docs.pages import DOCS, PAGES, ROOT, name_of, programs
from tests.tiny import padded_batch, tiny_llama
from tests.tools.exported import trained_lora
from tests.train.tiny_run import make_tokenizer

# Trainers on this machine, in a few steps.
ON_CPU = "SFTConfig(use_cpu=True, bf16=False, max_steps=2, disable_tqdm=True, "
DENSE, SPARSE = "Qwen/Qwen3-0.6B", "allenai/OLMoE-1B-7B-0924"


def dense(folder: Path) -> dict:
    return {"base": tiny_llama()}


def sparse(folder: Path) -> dict:
    return {"base": tiny_olmoe(), "sparse": tiny_olmoe(), "dataloader": [padded_batch([9, 6])]}


def measured(folder: Path) -> dict:
    batches = [padded_batch([9, 6]), padded_batch([5, 8])]
    batches = [{**batch, "labels": batch["input_ids"]} for batch in batches]
    return {"base": tiny_llama(), "fresh": tiny_llama(), "batches": batches}


def watched(folder: Path) -> dict:
    """A model, two batches without padding, and what a training run has left."""
    logits = torch.randn(5, 4)
    routing = Routing(logits.softmax(-1), None, logits, logits.softmax(-1))
    (folder / "outputs/capitals").mkdir(parents=True)
    history = RoutingHistory()
    history.append(10, Reading({("layers.0", "default"): RoutingStatistics.of(routing)}, {}))
    history.save(folder / "outputs/capitals")
    return {"base": tiny_llama(), "batch": padded_batch([6, 6]), "other_batch": padded_batch([6, 6], seed=2)}


def two(folder: Path) -> dict:
    def lora_layers(model):
        return [module for module in model.modules() if isinstance(module, LoraLayer)]

    return {"base": tiny_llama(), "again": tiny_llama(), "batch": padded_batch([6, 4]), "lora_layers": lora_layers}


def finished(folder: Path) -> dict:
    tiny_llama().save_pretrained(folder / "base")
    models = {"dense": tiny_llama(), "dense_again": tiny_llama(), "sparse": tiny_olmoe(), "sparse_again": tiny_olmoe()}
    law, tax = (str(trained_lora(folder / name, seed)) for seed, name in enumerate(("law", "tax")))
    return {**models, "law": law, "tax": tax, "fresh": tiny_llama, "batches": [padded_batch([9, 6])]}


# Page -> what its programs find, and a text that they print.
SETTINGS = {
    "deploy.md": (sparse, "Expert LoRA, pairs of rank 16 on every expert of the backbone: merges exactly: True"),
    "evaluate.md": (measured, "the difference is the routers"),
    "index.md": (dense, "LoRAMoE: 8 experts of rank 4"),
    "learning_rates.md": (dense, "parameters: 4 experts of rank 4"),
    "look_inside.md": (watched, "most alike"),
    "methods/esft.md": (sparse, "experts"),
    "methods/expert_lora.md": (sparse, "Expert LoRA: pairs of rank 16"),
    "methods/loramoe.md": (dense, "LoRAMoE: 6 experts of rank 4"),
    "methods/molora.md": (dense, "MoLORA: 10 experts of rank 4"),
    "methods/mov.md": (dense, "MoV: 10 vectors"),
    "methods/perft.md": (sparse, "PERFT: variant R, 8 experts of rank 16"),
    "methods/routed.md": (dense, "Routed experts: 8 experts of rank 4, router top_k, top 2"),
    "methods/sira.md": (dense, "SiRA: 16 experts of rank 4"),
    "migrating.md": (two, "equal: True"),
    "quantization.md": (dense, "parameters are trained"),
    "start.md": (dense, "MoLORA: 4 experts of rank 4"),
    "tools.md": (finished, "distilled, rank 4: loss"),
    "your_data.md": (dense, "['prompt', 'completion', 'task_type']"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Folders that stand for models of the Hub."""
    folders = {}
    for name, model in ((DENSE, tiny_llama()), (SPARSE, tiny_olmoe())):
        folders[name] = str(tmp_path_factory.mktemp("models") / name.rpartition("/")[2])
        model.save_pretrained(folders[name])
        make_tokenizer().save_pretrained(folders[name])
    return folders


@pytest.mark.parametrize("page", SETTINGS)
def test_the_programs_of_a_page_run_in_order_as_printed(page, models, tmp_path, monkeypatch, capsys):
    if page == "quantization.md":
        pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)
    make_names, printed = SETTINGS[page]
    names = make_names(tmp_path)
    found = programs(DOCS / page)
    assert found
    for number, program in enumerate(found, 1):
        for name, folder in models.items():
            program = program.replace(name, folder)
        program = program.replace("SFTConfig(output_dir=", f"{ON_CPU}output_dir=")
        exec(compile(program, f"{page}, program {number}", "exec"), names)
    assert printed in capsys.readouterr().out


def test_no_page_has_programs_that_nothing_runs():
    """Here, or in a test that names the page."""
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__))
    for page in PAGES:
        assert not programs(page) or name_of(page) in SETTINGS or f'{name_of(page)}"' in tests, page
