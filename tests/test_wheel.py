"""The wheel, installed away from the repository: every verb, a run by name, and a broken adapter."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from moe_peft.cli.verbs import VERBS
from tests.contract.cases import tiny_olmoe
from tests.train.tiny_run import make_base, make_tokenizer

ROOT = Path(__file__).parents[1]
SOURCES = ("moe_peft", "train", "configs", "pyproject.toml", "setup.py", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the package as an installer would unpack it."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        path = ROOT / name
        shutil.copytree(path, folder / "src" / name) if path.is_dir() else shutil.copy(path, folder / "src" / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder), str(folder / "src")]
    subprocess.run(build, check=True, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "-q", "--target", str(folder / "site"), str(wheel)], check=True)
    return folder / "site"


def outside(site, cwd, *command):
    """Run a command outside of the repository, where the installed package is the only one; what it printed."""
    tool = find_spec("lm_eval")
    tools = [] if tool is None or tool.origin is None else [str(Path(tool.origin).parents[1])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(site), *tools]),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(cwd / "cache"),
    }
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-1500:] + result.stderr[-3000:]
    return result.stdout


# Several commands in one process, as importing the stack takes longer than what they do.
COMMANDS = """
import contextlib, io, json, sys
from pathlib import Path
import moe_peft
from moe_peft.cli import main
assert Path(sys.argv[1]) in Path(moe_peft.__file__).parents, moe_peft.__file__
found = []
for words in json.loads(sys.argv[2]):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            code = main(words)
        except SystemExit as end:
            code = end.code or 0
    found.append((code, printed.getvalue()))
Path("found.json").write_text(json.dumps(found))
"""


def moe_peft(site, cwd, *commands):
    """Exit code and text of each command of the installed package."""
    outside(site, cwd, sys.executable, "-c", COMMANDS, str(site), json.dumps(commands))
    return json.loads((cwd / "found.json").read_text())


@pytest.mark.slow
def test_every_verb_runs_from_the_wheel(site, tmp_path):
    base = make_base(tmp_path / "base")
    chat = [{"role": "user", "content": "w7 w8"}, {"role": "assistant", "content": "w9"}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for _ in range(12)))
    run = ["--config", "quickstart", "--model_name_or_path", base, "--dataset_name", "chats.jsonl"]
    run += ["--moe_config", "methods/sira", "--moe_report", "false", "--max_steps", "2", "--output_dir", "out"]
    printed = outside(site, tmp_path, sys.executable, str(site / "bin/moe-peft"), "sft", *run)
    assert "The adapter is in out" in printed
    shutil.copytree(tmp_path / "out", tmp_path / "broken")
    weights = tmp_path / "broken/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (twelve_lines,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "readme.py").write_text(twelve_lines.replace("Qwen/Qwen3-0.6B", base))
    done = {
        ("--help",): "usage: moe-peft VERB",
        ("configs",): "olmoe_1b_7b_expert_lora",
        ("configs", "olmoe_1b_7b_expert_lora"): "moe_method: expert_lora",
        ("describe", "--model", base, "--moe_config", "sira", "--max_length", "16"): "SiRA: 16 experts",
        ("inspect", "out"): "SiRA",
        ("route", "--adapter", "out", "w7 w8"): "w7",
        ("run", "readme.py"): "LoRAMoE: 8 experts of rank 4",
        ("run", "-m", "moe_peft", "configs"): "olmoe_1b_7b_expert_lora",
        **{(verb, "--help"): "usage: moe-peft " for verb in VERBS},
    }
    *found, broken = moe_peft(site, tmp_path, *done, ("inspect", "broken"))
    assert_done(done, found)
    code, printed = broken
    assert code == 1 and "Traceback" not in printed and "truncated or damaged" in printed
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()


def assert_done(done, found):
    """Every command ended with 0 and printed what was expected of it."""
    for (words, expected), (code, printed) in zip(done.items(), found, strict=True):
        assert code == 0 and expected in printed, (words, printed[-2000:])


@pytest.mark.slow
def test_methods_are_compared_from_the_wheel(site, tmp_path):
    make_base(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "w{4 + i} w5 w6"}}\n' for i in range(16)))
    for method in ("routed", "lora"):
        (tmp_path / f"{method}.yaml").write_text(f"moe_method: {method}\nmoe_r: 2\n")
    run = ["--model_name_or_path", "base", "--dataset_name", "rows.jsonl", "--test_split_size", "4", "--use_cpu"]
    run += ["--config", "routed.yaml", "--config", "lora.yaml", "--max_steps", "2", "--seeds", "0"]
    done = {("compare", *run, "--output_dir", "out"): "| lora "}
    assert_done(done, moe_peft(site, tmp_path, *done))
    rows = {row["method"]: row for row in json.loads((tmp_path / "out/compare.json").read_text())["table"]}
    sizes = [row["trained parameters"] for row in rows.values()]
    assert list(rows) == ["routed", "lora"] and max(sizes) < 1.1 * min(sizes)
    assert all(row["eval_loss"][0] > 0 for row in rows.values())


@pytest.mark.slow
def test_verbs_for_finished_adapters_work_from_the_wheel(site, tmp_path):
    tiny_olmoe().save_pretrained(tmp_path / "sparse")
    make_tokenizer().save_pretrained(tmp_path / "sparse")
    base = make_base(tmp_path / "base")
    texts = [f"w{4 + i} w5 w6" for i in range(12)]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for method, on, out in (("routed", base, "routed"), ("expert_lora", "sparse", "pairs"), ("lora", base, "lora")):
        run = ["--model_name_or_path", str(on), "--dataset_name", "rows.jsonl", "--moe_method", method, "--max_steps"]
        run += ["1", "--use_cpu", "--moe_r", "2", "--output_dir", out]
        outside(site, tmp_path, sys.executable, str(site / "bin/moe-peft"), "sft", *run)
    done = {
        ("report", "--adapter", "routed", "--data", "rows.jsonl", "--no-plots"): "report      routed",
        ("prune", "routed", "--texts", "texts.txt", "--keep", "4", "--output", "fewer"): "fewer",
        ("add-expert", "routed", "--copy_of", "0", "--output", "more"): "more",
        ("compress", "routed", "--output", "small"): "small",
        ("decompress", "small", "--output", "again"): "again",
        (
            "distil",
            "routed",
            "--texts",
            "texts.txt",
            "--rank",
            "4",
            "--steps",
            "2",
            "--output",
            "distilled",
        ): "distilled",
        ("upcycle", "lora", "--num_experts", "2", "--output", "made"): "made",
        ("export", "pairs", "--to", "merged", "--base", "sparse", "--output", "merged"): "merged",
        ("export", "pairs", "--to", "experts", "--output", "tensors"): "tensors",
        **{("inspect", name): "whole: every tensor" for name in ("fewer", "more", "again", "made")},
    }
    assert_done(done, moe_peft(site, tmp_path, *done))
    assert (tmp_path / "routed/routing_report/index.html").is_file()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_lm_eval_measures_an_adapter_from_the_wheel(site, tmp_path):
    base = make_base(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text('{"text": "w4 w5"}\n' * 8)
    run = ["sft", "--model_name_or_path", base, "--dataset_name", "rows.jsonl", "--moe_method", "sira", "--use_cpu"]
    command = [sys.executable, str(site / "bin/moe-peft")]
    outside(site, tmp_path, *command, *run, "--max_steps", "1", "--output_dir", "out")
    (tmp_path / "questions.jsonl").write_text('{"question": "w4", "choices": ["w5", "w6"], "answer": 0}\n' * 4)
    (task,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/evaluate.md").read_text(), re.DOTALL)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/capitals.yaml").write_text(task)
    tool = ["run", "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={base},peft=out,dtype=float32"]
    tool += ["--tasks", "capitals", "--include_path", "tasks", "--device", "cpu"]
    assert "|capitals|" in outside(site, tmp_path, *command, *tool)


@pytest.mark.slow
def test_the_wheel_holds_the_package_the_scripts_and_the_configurations_alone(site):
    (wheel,) = site.parent.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for folder, ending in (("train", "py"), ("configs", "yaml"), ("moe_peft", "py")):
        inside = "moe_peft" if folder == "moe_peft" else f"moe_peft/{folder}"
        own = {str(path.relative_to(ROOT / folder)) for path in (ROOT / folder).rglob(f"*.{ending}")}
        assert own <= {name.removeprefix(f"{inside}/") for name in names if name.startswith(inside)}
    assert {name.split("/")[0] for name in names} == {
        "moe_peft",
        next(n for n in names if "dist-info" in n).split("/")[0],
    }


@pytest.mark.slow
@pytest.mark.skipif(find_spec("twine") is None, reason="twine is not installed")
def test_an_index_would_take_the_wheel_and_its_readme(site):
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, site.parent.glob("*.whl"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "PASSED" in done.stdout, done.stdout + done.stderr
