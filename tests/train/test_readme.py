"""Every command of train/README.md is one that accelerate and the script it starts accept."""

from __future__ import annotations

import importlib
import re
import shlex
from dataclasses import fields

import pytest
import trl
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from tests.train.tiny_run import ROOT

README = (ROOT / "train/README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_launcher_and_the_script_take_every_flag(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert command.startswith("accelerate launch ")
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(shlex.split(command)[2:]))
    script, flags = arguments.training_script, arguments.training_script_args
    assert (ROOT / script).is_file() and re.fullmatch(r"train/\w+\.py", script)
    module = importlib.import_module(script[len("train/") : -len(".py")])
    # On this machine, whatever the command is for.
    parsed = module.make_parser().parse_args_and_config([*flags, "--use_cpu", "true", "--bf16", "false"])
    assert parsed[2].model_name_or_path


def test_every_script_and_launch_form_has_a_command():
    scripts = {path.name for path in (ROOT / "train").glob("*.py") if "def make_parser" in path.read_text()}
    assert scripts == {re.search(r"train/(\w+\.py)", command)[1] for command in COMMANDS}
    forms = {path.name for path in (ROOT / "configs/accelerate").glob("*.yaml")}
    assert forms == set(re.findall(r"configs/accelerate/(\w+\.yaml)", README))


def test_the_trainers_with_a_balance_loss_of_the_backbone_are_those_the_page_names():
    configs = {"SFT": trl.SFTConfig, "DPO": trl.DPOConfig, "KTO": trl.KTOConfig, "GRPO": trl.GRPOConfig}
    for config in configs.values():
        assert "router_aux_loss_coef" in {field.name for field in fields(config)}
    assert "router_aux_loss_coef" not in {field.name for field in fields(trl.RewardConfig)}
    assert "`router_aux_loss_coef` (SFT, DPO, KTO and GRPO have it, reward does not)" in README
