"""The wheel, installed away from the repository: every verb, a run by name, and a broken adapter."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.train.tiny_run import make_base

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


def moe_peft(site, cwd, *words):
    """Run the command of the installed package; its exit code and what it printed."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(site),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(cwd / "cache"),
    }
    command = [sys.executable, str(site / "bin/moe-peft"), *words]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    return result.returncode, result.stdout + result.stderr


@pytest.mark.slow
def test_every_verb_runs_from_the_wheel(site, tmp_path):
    assert moe_peft(site, tmp_path, "--help")[0] == 0
    code, printed = moe_peft(site, tmp_path, "run", "-m", "moe_peft", "configs")
    assert code == 0 and "olmoe_1b_7b_expert_lora" in printed
    base = make_base(tmp_path / "base")
    chat = [{"role": "user", "content": "w7 w8"}, {"role": "assistant", "content": "w9"}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for _ in range(12)))
    run = ["--config", "quickstart", "--model_name_or_path", base, "--dataset_name", "chats.jsonl"]
    run += ["--moe_config", "methods/sira", "--moe_report", "false", "--max_steps", "2", "--output_dir", "out"]
    code, printed = moe_peft(site, tmp_path, "sft", *run)
    assert code == 0 and "The adapter is in out" in printed, printed[-3000:]
    assert moe_peft(site, tmp_path, "describe", "--model", base, "--moe_config", "sira")[0] == 0
    code, printed = moe_peft(site, tmp_path, "inspect", "out")
    assert code == 0 and printed.startswith("SiRA"), printed[-3000:]
    assert moe_peft(site, tmp_path, "route", "--adapter", "out", "w7 w8")[0] == 0
    weights = tmp_path / "out/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    code, printed = moe_peft(site, tmp_path, "inspect", "out")
    assert code == 1 and "Traceback" not in printed and "truncated or damaged" in printed
    for verb in ("rloo", "select-experts"):
        code, printed = moe_peft(site, tmp_path, verb, "--help")
        assert code == 0 and printed.startswith(f"usage: moe-peft {verb}"), printed[-2000:]


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
