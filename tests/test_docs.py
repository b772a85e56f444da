"""The README's program runs as printed, and the files it names exist."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.loading import load_file
from tests.tiny import tiny_llama

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_programs_of_the_readme_run_as_printed(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    programs = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert programs
    for program in programs:
        program = program.replace("Qwen/Qwen3-0.6B", str(tmp_path / "base"))
        command = [sys.executable, "-c", program]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ})
        assert result.returncode == 0, result.stderr[-2000:]
        assert "LoRAMoE: 8 experts of rank 4" in result.stdout
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()


def test_the_programs_of_the_training_page_run_as_printed(tmp_path):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    import moe_peft
    from tests.integrations.trainers import tokenizer

    tiny_llama().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    attached, grouped, pushed = re.findall(r"```python\n(.*?)```", (ROOT / "docs/training.md").read_text(), re.DOTALL)
    settings = {"max_steps": 3, "logging_steps": 1, "use_cpu": True, "bf16": False, "save_strategy": "no"}
    args = SFTConfig(str(tmp_path / "run"), report_to=[], **settings)
    data = Dataset.from_list([{"text": f"w{3 + i} w{4 + i} w{5 + i}"} for i in range(8)])
    names = {"model": AutoModelForCausalLM.from_pretrained(tmp_path), "args": args, "data": data}
    exec(attached, names)
    assert any("moe/load_entropy" in entry for entry in names["trainer"].state.log_history)
    assert 1e-4 in {group["initial_lr"] for group in names["trainer"].optimizer.param_groups}
    config = moe_peft.RoutedConfig(task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    trainer = SFTTrainer(model, args, train_dataset=data, peft_config=config)
    exec(grouped, {"moe_peft": moe_peft, "trainer": trainer})
    trainer.train()
    assert len({group["initial_lr"] for group in trainer.optimizer.param_groups}) == 3
    assert pushed.startswith("moe_peft.push_adapter(")


def test_the_programs_of_the_page_on_sparse_backbones_run_as_printed(capsys, tmp_path):
    from peft import get_peft_model

    import moe_peft
    from tests.contract.cases import tiny_olmoe
    from tests.tiny import padded_batch

    perft, esft, four_bit = re.findall(r"```python\n(.*?)```", (ROOT / "docs/moe_backbones.md").read_text(), re.DOTALL)
    names = {"base": tiny_olmoe()}
    exec(perft, names)
    assert "PERFT: variant R, 8 experts of rank 16" in capsys.readouterr().out
    names = {"base": tiny_olmoe(), "dataloader": [padded_batch([9, 6])], "moe_peft": moe_peft}
    exec(esft, {**names, "get_peft_model": get_peft_model}, names)
    assert names["model"].peft_config["default"].experts == names["config"].experts
    if find_spec("bitsandbytes"):
        tiny_olmoe().save_pretrained(tmp_path)
        names = {"name": str(tmp_path)}
        exec(four_bit, names)
        assert names["model"].get_parameter("model.layers.0.mlp.gate.weight").dtype == torch.bfloat16
        assert not any(p.dim() == 3 for p in names["model"].parameters())


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]
)
def test_files_and_targets_that_a_document_names_exist(document):
    text = (ROOT / document).read_text()
    for name in re.findall(r"`((?:moe_peft|train|configs|tests|benchmarks|docs)/[\w./-]*)`", text):
        assert "<" in name or (ROOT / name).exists(), name
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name in re.findall(r"make ([a-z]+)\b", text):
        if f"`make {name}`" in text or f"\nmake {name}" in text:
            assert name in targets, name


def test_the_page_on_the_architecture_names_every_room_and_nothing_that_is_not_there():
    package = ROOT / "moe_peft"
    text = (ROOT / "docs/architecture.md").read_text()
    rooms = {path.relative_to(ROOT).as_posix() for path in package.iterdir() if (path / "__init__.py").is_file()}
    assert not [room for room in sorted(rooms) if f"`{room}/" not in text and room != "moe_peft/methods"]
    code = "\n".join(path.read_text() for path in package.rglob("*.py"))
    known = set(re.findall(r"^\s*(?:def|class) (\w+)|^\s*(?:self\.)?(\w+)\b(?=[:=]| =)", code, re.MULTILINE))
    known = {name for pair in known for name in pair} | {path.stem for path in package.iterdir()}
    known |= {"get_peft_model", "model", "batch", "forward"}  # of the libraries around
    for own in re.findall(r"`([^`]+)`", text):
        if "/" not in own and not own.endswith(".toml") and not own.startswith(("make ", "[")):
            unknown = [name for name in re.findall(r"[A-Za-z_]\w+", own) if name not in known]
            assert not unknown, f"{own} names {unknown}, which no file of the package defines"


def test_the_picture_of_the_rooms_is_the_one_that_the_order_of_imports_draws():
    drawing = load_file(ROOT / "docs/draw_architecture.py")
    assert drawing.PICTURE.read_text() == drawing.draw(), "run python docs/draw_architecture.py"
    rooms = {room for layer in drawing.layers() for room in layer}
    folders = {
        path.stem for path in (ROOT / "moe_peft").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert rooms == folders - {"__init__"}


def test_the_picture_of_a_layer_is_the_one_that_its_program_draws():
    drawing = load_file(ROOT / "docs/draw_overview.py")
    assert drawing.PICTURE.read_text() == drawing.draw(), "run python docs/draw_overview.py"
    assert max(drawing.WEIGHTS) <= 1 and sum(drawing.WEIGHTS) == pytest.approx(1)


def test_the_table_of_methods_names_every_public_configuration():
    from moe_peft.methods import METHODS

    for config in METHODS.values():
        assert f"`{config.__name__}`" in README


# The longest takes as long as three others; tests/tools has its parts.
EXAMPLES = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem.startswith("08") else [])
    for path in sorted(ROOT.glob("examples/*.py"))
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_run_and_stay_short(example, capsys):
    assert len(example.read_text().splitlines()) <= 80
    runpy.run_path(str(example), run_name="__main__")
    expected = {
        "01_plain_loop": "reloaded logits equal: True",
        "02_look_inside": "model.layers.1.self_attn.o_proj",
        "03_perft_olmoe": "reloaded logits equal: True",
        "04_esft": "nothing but the selected experts changed: True",
        "05_mov_t5": "reloaded logits equal: True",
        "06_expert_lora": "losses and gradients equal: True",
        "08_compose_and_export": "exact: True",
        "07_routing_report": "page written: True",
        "09_larger_and_smaller": "routers as they were: True",
        "10_other_files": "all equal: True",
    }
    assert expected[example.stem] in capsys.readouterr().out


def test_the_programs_of_the_page_on_expert_lora_run_as_printed(tmp_path, capsys):
    from tests.contract.cases import tiny_olmoe

    stock, own, files = re.findall(r"```python\n(.*?)```", (ROOT / "docs/expert_lora.md").read_text(), re.DOTALL)
    exec(stock, {"base": tiny_olmoe()})
    names = {"base": tiny_olmoe()}
    exec(own, names)
    assert "pairs of rank 16 on every expert" in capsys.readouterr().out
    names = {"model": names["model"], "base": tiny_olmoe(), "folder": str(tmp_path)}
    exec(files, names)
    assert {path.name for path in tmp_path.iterdir()} == {"stock", "serving"}


def test_the_program_of_the_page_on_threads_runs_as_printed():
    from peft import get_peft_model

    import moe_peft
    from tests.contract.cases import randomize
    from tests.tiny import padded_batch

    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/serving_threads.md").read_text(), re.DOTALL)
    model = get_peft_model(tiny_llama(), moe_peft.LoraMoeConfig(task_type="CAUSAL_LM"), adapter_name="law")
    model.add_adapter("code", moe_peft.LoraMoeConfig(task_type="CAUSAL_LM", num_experts=2))
    randomize(model)
    requests = {"ann": padded_batch([5, 3], side="left"), "bob": padded_batch([4], seed=2)}
    names = {"model": model, "requests": requests}
    exec(program, names)
    for user, adapter in (("ann", "law"), ("bob", "code")):
        model.set_adapter(adapter)
        assert torch.equal(names["answers"][user], model.generate(**requests[user], max_new_tokens=8))


def test_every_row_on_robustness_names_tests_that_exist():
    rows = [line for line in (ROOT / "docs/robustness.md").read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith("| fault |")]
    assert len(rows) >= 35
    for row in rows:
        files = re.findall(r"tests/[\w/]+\.py", row.rsplit("|", 2)[-2])
        assert files, row
        assert all("def test_" in (ROOT / name).read_text() for name in files), row


TOOL = """import sys
from peft import AutoPeftModelForCausalLM
print(type(AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]).base_model).__name__)
"""


def test_the_commands_of_the_page_on_the_command_line_run_as_printed(tmp_path, monkeypatch, capsys):
    import json

    from moe_peft.cli import launch, main
    from tests.train.tiny_run import make_base

    make_base(tmp_path / "base")
    chat = [{"role": "user", "content": "w7 w8"}, {"role": "assistant", "content": "w9"}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for _ in range(12)))
    (tmp_path / "tool.py").write_text(TOOL)
    monkeypatch.chdir(tmp_path)
    # The script runs in this process instead of taking its place.
    start = lambda command, environment: launch.run_here(Path(command[1]), "moe-peft sft", command[2:])  # noqa: E731
    monkeypatch.setattr(launch, "replace_process", start)
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/command_line.md").read_text(), re.DOTALL)
    commands = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    assert len(commands) == 8, commands
    for command in commands:
        program, *words = shlex.split(command)
        assert program == "moe-peft" and main(words) == 0, command
    printed = capsys.readouterr().out
    for expected in (
        "The adapter is in outputs/first",
        "LoRAMoE (LORAMOE",
        "activations of 128 tokens",
        "LoraMoeModel",
    ):
        assert expected in printed


def test_the_page_on_the_command_line_names_every_verb():
    from moe_peft.cli.verbs import VERBS

    text = (ROOT / "docs/command_line.md").read_text()
    assert [verb for verb in VERBS if f"`{verb}`" not in text] == []
