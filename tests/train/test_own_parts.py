"""Parts and methods of somebody's own file are trained, saved, described and inspected from the command line."""

from __future__ import annotations

import json
import sys
from unittest.mock import patch

import flags
import pytest
import sft
import yaml
from common import moe_config
from peft import PeftModel

from moe_peft.cli import main
from moe_peft.extend import LOSSES, METHODS, SCORERS
from tests.tiny import tiny_llama
from tests.train.tiny_run import ON_CPU, make_base, make_data, words

FILE = '''
"""A method of my own."""
from __future__ import annotations
from dataclasses import dataclass, field
from typing import ClassVar, Literal
import torch
from moe_peft.extend import *


class Scaled(LinearRouter):
    """z = kappa W x."""
    options = (Option("kappa", 1.0, "a positive number", lambda value: 0 < value < 1e6, "Scale."),)

    def __init__(self, in_features, num_experts, *, kappa=1.0, **settings):
        super().__init__(in_features, num_experts, **settings)
        self.kappa = kappa

    def scores(self, x, context):
        return self.kappa * super().scores(x, context)


class Square(RouterLoss):
    """Mean square of the probabilities, whose weight grows."""
    adapts = True
    options = (Option("growth", 2.0, "a number from 1", lambda value: 1 <= value <= 10, "Growth in a step."),)

    def __init__(self, *, growth=2.0):
        self.growth = growth

    def sums(self, routing):
        return torch.stack([masked_sum(routing.probs.square().sum(-1), routing), num_valid(routing)])

    @staticmethod
    def value(sums):
        return sums[..., 0] / sums[..., 1].clamp_min(1)

    def adapt(self, coefficient, statistics):
        return min(coefficient * self.growth, 100.0)


@dataclass
class OwnConfig(RouterConfig, LowRankConfig, PlacingConfig):
    method: ClassVar[str] = "Own"
    equation: ClassVar[str] = "y = W0 x + own"
    source: ClassVar[str] = "me"
    adapter_type: ClassVar[str] = "OWNMETHOD"
    tone: Literal["soft", "loud"] = field(default="soft", metadata={"help": "How loud."})
    span: tuple[int, int] = field(default=(0, 1), metadata={"help": "From and to."})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = extend_peft_type("OWNMETHOD")

    def build(self, place):
        factor = 2.0 if self.tone == "loud" else 1.0
        settings = {"num_experts": self.num_experts, "r": self.r, "init_weights": self.init_weights}
        bank = LowRankExperts(place.in_features, place.out_features, scaling=factor * self.scaling, **settings)
        return RoutedParts(experts=bank, router=build_router(self, place.in_features, self.num_experts))


class OwnModel(RoutedTuner):
    prefix: str = "ownmethod_"


register(OwnConfig, OwnModel)
SCORERS["scaled"], LOSSES["square"], METHODS["own"] = Scaled, Square, OwnConfig
'''


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "parts_of_mine.py"
    path.write_text(FILE)
    known = [patch.dict(registry) for registry in (SCORERS, LOSSES, METHODS, flags.CONFIGS)]
    paths = list(sys.path)
    for own in known:
        own.start()
    yield path
    for own in known:
        own.stop()
    sys.path[:] = paths
    sys.modules.pop(path.stem, None)


def parsed(*arguments):
    settings = ["--output_dir", "out", "--use_cpu", "true", "--bf16", "false", "--model_name_or_path", "none"]
    return sft.make_parser().parse_args_and_config([*settings, *arguments])[-1]


def test_a_method_of_ones_own_has_flags_and_reads_yaml(file, tmp_path):
    own = ["--moe_import", str(file), "--moe_method", "own", "--moe_tone", "loud", "--moe_span", "3", "5"]
    config = moe_config(parsed(*own))
    assert (config.method, config.tone, config.span) == ("Own", "loud", (3, 5))
    method, run = tmp_path / "method.yaml", tmp_path / "run.yaml"
    method.write_text(yaml.safe_dump({"moe_import": str(file), "moe_method": "own", "moe_span": [1, 2]}))
    run.write_text(yaml.safe_dump({"moe_method": "routed", "moe_top_k": 1}))
    config = moe_config(parsed("--config", str(run), "--moe_config", str(method)))
    assert (config.method, config.tone, config.span) == ("Own", "soft", (1, 2))
    with pytest.raises(ValueError, match="OwnConfig: tone='quiet' must be one of 'soft', 'loud'"):
        moe_config(parsed(*own[:4], "--moe_tone", "quiet"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--moe_import", "nowhere.py"], "--moe_import nowhere.py: there is no such file"),
        (["--moe_import", "no_such_module"], "--moe_import no_such_module: there is no such module"),
        (["--moe_import"], "--moe_import needs a file"),
        (["--moe_method", "routed", "--moe_scorer", "scaled"], "a part of your own once its file has been imported"),
    ],
)
def test_what_cannot_be_imported_is_said_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message):
        moe_config(parsed(*arguments))


def test_an_adapter_of_ones_own_parts_goes_from_a_run_file_to_the_card_and_through_every_verb(file, tmp_path, capsys):
    rows = [{"text": words(seed, 12)} for seed in range(6)]
    base, folder = make_base(tmp_path / "base"), tmp_path / "out"
    run = {
        **ON_CPU,
        "model_name_or_path": base,
        "dataset_name": make_data(tmp_path / "data", rows),
        "output_dir": str(folder),
        "max_steps": 2,
        "moe_import": [str(file)],
        "moe_method": "routed",
        "moe_scorer": "scaled",
        "moe_router_args": {"kappa": 3.0},
        "moe_losses": {"square": {"weight": 0.1, "growth": 3.0}},
        "moe_num_experts": 2,
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    trainer = sft.main(*sft.make_parser().parse_args_and_config(["--config", str(path)]))
    layer = next(layer for layer in trainer.model.modules() if hasattr(layer, "objectives"))
    states = json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert states["MoeCallback"]["attributes"]["coefficients"] == {"default/square": pytest.approx(0.9)}
    assert layer.router["default"].kappa == 3.0
    card = (folder / "README.md").read_text()
    assert "import moe_peft\nimport parts_of_mine  # Scaled, Square\n" in card
    assert PeftModel.from_pretrained(tiny_llama(), folder).peft_config["default"].router_args == {"kappa": 3.0}
    capsys.readouterr()
    for words_ in ([str(folder), "--moe_import", str(file)], ["--moe_import", str(file), str(folder)]):
        assert main(["inspect", *words_]) == 0
        assert "scorer=scaled" in capsys.readouterr().out
