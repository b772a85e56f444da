"""Every method with every run is an arm of its own name, and what differs beside the method is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from comparable import Arm, arms_of, check_shared


def test_methods_with_runs_have_the_names_of_what_tells_them_apart():
    rest = ["--max_steps", "3"]
    assert arms_of([], ["a/sira.yaml", "lora"], rest) == [
        Arm("sira", ["--moe_config", "a/sira.yaml", *rest]),
        Arm("lora", ["--moe_config", "lora", *rest]),
    ]
    assert [arm.name for arm in arms_of(["run.yaml"], ["sira", "lora"], [])] == ["sira", "lora"]
    assert [arm.name for arm in arms_of(["one.yaml", "two.yaml"], [], [])] == ["one", "two"]
    four = arms_of(["one.yaml", "two.yaml"], ["sira", "lora"], [])
    assert [arm.name for arm in four] == ["one-sira", "one-lora", "two-sira", "two-lora"]
    assert four[3].words == ["--config", "two.yaml", "--moe_config", "lora"]


def test_a_setting_that_differs_is_named_with_both_values():
    first, second = SimpleNamespace(max_length=5, seed=0), SimpleNamespace(max_length=5, seed=1)
    check_shared({"a": (first,), "b": (second,)})
    second.max_length = 6
    with pytest.raises(ValueError, match="a and b cannot be compared: max_length is 5 in one and 6 in the other"):
        check_shared({"a": (first,), "b": (second,)})
