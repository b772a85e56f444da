"""Patterns: usual ones are taken, broken and endless ones are refused."""

from __future__ import annotations

import re
import time

import pytest
from peft import get_peft_model

from moe_peft import (
    ExpertLoraConfig,
    LoraMoeConfig,
    MovConfig,
    PerftConfig,
    RoutedConfig,
)
from moe_peft.config.patterns import check_patterns
from moe_peft.layers import RoutedLayer
from tests.adapter_types import ALL
from tests.tiny import tiny_llama, tiny_mixtral

USUAL = [
    r".*_proj",
    r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj",
    r".*\.layers\.(0|1|[2-9]\d?)\..*(q|k|v|o|gate|up|down)_proj",
    r"^(?!.*(vision|visual|audio)).*(?:q_proj|k_proj|v_proj|o_proj).*$",
    r"^(?:.*\.)?(?:language_model|text_model)\..*\.(?:self_attn|mlp)\.(?:.*)_proj$",
    r".*(self_attn|mlp).*(q|k|v|gate)_proj.*",
    r"(\w+\.)*layers\.(\d+)\.(\w+\.)*\w+_proj",
    r"([a-z_0-9]+\.)+(gate|up)_proj",
    r"(?i).*\.LAYERS\.[0-9]+\..*proj",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:k_proj|v_proj|q_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp)\.(?:(?:k_proj|v_proj|q_proj|gate_proj))$)",
]
ENDLESS = [
    r"(a+)+b",
    r"(.*)*x",
    r"(.*.*)*_proj!",
    r"(\w+\.?)+!",
    r"(a|a)*b",
    r"(a|aa)+$!",
    r"([a-z.0-9_]+)*!",
    r".*.*.*.*.*.*.*.*!",
    r".*?.*?.*?.*?.*?.*?.*?!",
    r"(?=(\w+.)+!).*",
    r"(?:(?:\w|\.)+)+!",
    r"(\w*\.*)*!",
    r"((model|layers|\.|\d|\w+)+)+!",
    r"(.+){20,30}!",
    r"(x?){40}x{40}",
]
BROKEN = ["(", "*", "[", "a{2,1}", "(?P<n>a)(?P<n>b)", "a**", "\\", "(?<=a+)b", "(" * 5000 + ")" * 5000, "a" * 5000]


@pytest.mark.parametrize("pattern", USUAL)
def test_usual_patterns_are_taken_and_match_as_ever(pattern):
    config = LoraMoeConfig(target_modules=pattern, num_experts=2, r=2)
    model = tiny_llama()
    wanted = [name for name, _ in model.named_modules() if name and re.fullmatch(pattern, name)]
    check_patterns(config, dict(model.named_modules()))
    if wanted:
        adapted = get_peft_model(model, config)
        found = [n for n, module in adapted.base_model.model.named_modules() if isinstance(module, RoutedLayer)]
        assert found == wanted


@pytest.mark.parametrize("pattern", ENDLESS)
def test_endless_patterns_are_refused_at_once(pattern):
    start = time.process_time()
    for field in ("target_modules", "exclude_modules"):
        with pytest.raises(ValueError, match=f"{field}=.*would take too long"):
            RoutedConfig(**{field: pattern})
    with pytest.raises(ValueError, match=r"layers_pattern=.*would take too long"):
        RoutedConfig(layers_to_transform=[0], layers_pattern=pattern)
    with pytest.raises(ValueError, match=r"modules_to_save=.*would take too long"):
        PerftConfig(modules_to_save=[pattern])
    with pytest.raises(ValueError, match=r"feedforward_modules=.*would take too long"):
        MovConfig(feedforward_modules=pattern)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("pattern", BROKEN)
def test_broken_patterns_are_refused_with_the_field(pattern):
    for fields in (
        {"target_modules": pattern},
        {"exclude_modules": pattern},
        {"layers_to_transform": [0], "layers_pattern": [pattern]},
        {"modules_to_save": [pattern]},
    ):
        with pytest.raises(ValueError, match=rf"{list(fields)[-1]}=.*regular expression") as error:
            RoutedConfig(**fields)
        assert len(str(error.value)) < 1000


@pytest.mark.parametrize("cls", ALL)
def test_fields_that_a_type_declares_anew_hold_patterns_all_the_same(cls):
    needed = {"experts": {"0": [0]}} if cls.__name__ == "EsftConfig" else {}
    for field in ("target_modules", "exclude_modules"):
        for pattern in ("(", "(a+)+b"):
            with pytest.raises(ValueError, match=f"{field}"):
                cls(**needed, **{field: pattern})


@pytest.mark.parametrize("pattern", ["(", "(a+)+b", "(.*)*x"])
def test_keys_that_are_patterns_are_checked_as_well(pattern):
    with pytest.raises(ValueError, match=r"rank_pattern=.*regular expression"):
        ExpertLoraConfig(rank_pattern={"q_proj": 2, pattern: 3})


def test_a_pattern_that_is_endless_on_the_names_of_a_model_alone_is_refused_before_anything_changes():
    config = RoutedConfig(target_modules=["q_proj"])
    config.target_modules = r"(\w+\.?)+!"
    for build in (tiny_llama, tiny_mixtral):
        model = build()
        before = {name: type(module) for name, module in model.named_modules()}
        start = time.process_time()
        with pytest.raises(ValueError, match="would take too long"):
            get_peft_model(model, config)
        assert time.process_time() - start < 5
        assert before == {name: type(module) for name, module in model.named_modules()}
