"""The page on learning rates has the rates that the scripts and the run files take."""

from __future__ import annotations

import re

import yaml
from rates import FACTORS

from moe_peft import EsftConfig
from moe_peft.methods import METHODS
from tests.docs.pages import DOCS, ROOT

PAGE = (DOCS / "learning_rates.md").read_text()
ROWS = [line.split(" | ") for line in PAGE.splitlines() if re.match(r"\| [\w, -]+ \| \de-\d \| ", line)]


def test_defaults_are_those_of_the_methods_and_rates_those_of_the_run_files():
    seen = set()
    for name, default, _, file, rate in ROWS:
        method, _, form = name.lstrip("| ").replace("expert LoRA", "expert_lora").partition(", ")
        method = method.partition("-")[0].lower()
        config = EsftConfig(expert_adapter="lora") if form else METHODS[method]()
        assert float(default) == config.default_learning_rate, name
        seen.add(method)
        if file != "-":
            run = yaml.safe_load((ROOT / file.strip("`")).read_text())
            assert run["moe_method"] == method and run["learning_rate"] == float(rate.rstrip("| ")), name
    assert seen == METHODS.keys() - {"routed"} and len(ROWS) == 9


def test_the_page_says_what_other_kinds_of_training_take():
    assert "Reward training takes half of the default, and DPO, KTO, GRPO and RLOO a tenth." in PAGE
    assert FACTORS == {"sft": 1.0, "reward": 0.5, "dpo": 0.1, "kto": 0.1, "grpo": 0.1, "rloo": 0.1}
